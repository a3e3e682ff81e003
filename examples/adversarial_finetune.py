"""`capt-peft finetune-backbone`, as a script: `accelerate launch examples/adversarial_finetune.py ...`."""

from capt_peft.commands import main

if __name__ == "__main__":
    main("finetune-backbone")
