"""`capt-peft evaluate`, as a script: `accelerate launch examples/evaluate.py ...`."""

from capt_peft.commands import main

if __name__ == "__main__":
    main("evaluate")
