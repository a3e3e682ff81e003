"""`capt-peft demo`, as a script: `accelerate launch examples/demo.py ...`."""

from capt_peft.commands import main

if __name__ == "__main__":
    main("demo")
