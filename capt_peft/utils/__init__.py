"""Files, locks, Markdown, modules, versions: what every part of the package uses and that knows none of them."""
