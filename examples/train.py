"""`capt-peft train`, as a script: `accelerate launch examples/train.py ...`."""

from capt_peft.commands import main

if __name__ == "__main__":
    main("train")
