"""CLIP as a zero-shot classifier: loading, class texts, the classifier."""
