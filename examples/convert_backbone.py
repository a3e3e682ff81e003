"""`capt-peft convert`, as a script: `accelerate launch examples/convert_backbone.py ...`."""

from capt_peft.commands import main

if __name__ == "__main__":
    main("convert")
