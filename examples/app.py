"""`capt-peft app`, as a script: `python examples/app.py ...`."""

from capt_peft.commands import main

if __name__ == "__main__":
    main("app")
