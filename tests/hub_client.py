"""The client side of the Hub tests: a process with its own environment that does one step after the other.

huggingface_hub reads its environment when it is imported, so a test cannot change it in its own process. `Client` starts this
file, sends it names of the functions below with their arguments as JSON, and gets back what they return or raise.
"""

import json
import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATH = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")]


class StepFailed(Exception):
    """What a step raised: `kind` is the type's name, `text` the whole traceback, with notes and causes."""

    def __init__(self, kind, message, text):
        super().__init__(f"{kind}: {message}")
        self.kind, self.message, self.text = kind, message, text


class Client:
    """A process that runs steps; everything it logs or prints goes to `log`."""

    def __init__(self, log, **environment):
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment = {
            **inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(PATH), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_DEBUG": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", **environment,
        }  # fmt: skip
        self.log = Path(log)
        with open(log, "w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
                env=environment,
            )  # fmt: skip

    def __call__(self, step, /, *arguments, **keywords):
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([step, arguments, keywords]) + "\n")
        self.process.stdin.flush()
        watchdog = threading.Timer(120, self.process.kill)
        watchdog.start()
        line = self.process.stdout.readline()
        watchdog.cancel()
        if not line:
            raise RuntimeError(f"The client died in {step}.\n{self.log.read_text()[-3000:]}")
        outcome, *content = json.loads(line)
        if outcome == "raised":
            raise StepFailed(*content)
        return content[0]

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


# ------------------------------------------------------------------------------------------------------------ the steps


def in_fresh_cache(folder):
    """From now on, downloads go to another cache."""
    from huggingface_hub import constants

    constants.HF_HUB_CACHE = folder


def in_chunks(size):
    """From now on, downloads are written in chunks of this size: the client's own are larger than our files."""
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE = size


def set_token(token):
    """Changes the token of the environment; None takes it away."""
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token


def push_base(name):
    """Pushes tiny CLIP with its processor."""
    from helpers import TINY_CLIP
    from transformers import AutoProcessor, CLIPModel

    CLIPModel.from_pretrained(TINY_CLIP).push_to_hub(name)
    AutoProcessor.from_pretrained(TINY_CLIP).push_to_hub(name)


def new_adapter(base, seed):
    """Returns a base model of the Hub with an adapter whose prompts are far from their start."""
    import torch
    from helpers import shake
    from peft import get_peft_model
    from transformers import CLIPModel

    from capt_peft import CaptConfig

    torch.manual_seed(0)
    config = CaptConfig(num_vision_tokens=4, class_names=["one", "two", "three"], template="a photo of a {}.")
    model = get_peft_model(CLIPModel.from_pretrained(base), config)
    shake(model, seed)
    return model.eval()


def save_adapter(base, seed, folder):
    """Saves an adapter to a folder, with results, and with files that are nobody's business."""
    model = new_adapter(base, seed)
    model.save_pretrained(folder)
    folder = Path(folder)
    for name, record in records(folder).items():
        (folder / name).write_text(json.dumps(record))
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "adapter_model.safetensors").write_bytes(b"old")
    return logits(model)


def records(folder):
    """Returns a record of a run and of an evaluation, of the weights in a folder."""
    from records import evaluation_record, run_record

    from capt_peft import CaptConfig
    from capt_peft.tuner.fingerprint import adapter_fingerprint

    config, fingerprint = CaptConfig.from_pretrained(folder).to_dict(), adapter_fingerprint(folder)
    evaluation = evaluation_record(fingerprint, config["base_model_fingerprint"])
    return {"results.json": run_record(fingerprint, config), "evaluation.json": evaluation}


def push_model(base, seed, name, **arguments):
    """Pushes an adapter as PEFT does, and returns its logits."""
    model = new_adapter(base, seed)
    model.push_to_hub(name, **arguments)
    return logits(model)


def push_adapter(folder, name, **arguments):
    """Pushes an adapter's folder as this package does."""
    from capt_peft.results.hub import push_adapter

    return push_adapter(folder, name, **arguments).oid


def push_adapter_model(base, seed, name, **arguments):
    """Pushes an adapter from memory as this package does, and returns its logits."""
    from capt_peft.results.hub import push_adapter

    model = new_adapter(base, seed)
    push_adapter(model, name, **arguments)
    return logits(model)


def push_lora(base, name):
    """Pushes a LoRA adapter from memory as this package does, and returns its logits."""
    import torch
    from helpers import shake
    from peft import get_peft_model
    from transformers import CLIPModel

    from capt_peft.methods import adapter_config
    from capt_peft.results.hub import push_adapter
    from capt_peft.tuner.others import keep_classes

    torch.manual_seed(0)
    model = get_peft_model(CLIPModel.from_pretrained(base), adapter_config("lora", {}))
    shake(model)
    keep_classes(model, class_names=["one", "two", "three"], template="a picture of {}.", class_texts=None)
    push_adapter(model.eval(), name, license="mit")
    return logits(model)


def classes(name):
    """Returns the class names and the template that come with an adapter."""
    from capt_peft import ZeroShotClassifier

    classifier = ZeroShotClassifier.from_pretrained(name)
    return [*classifier.class_names, classifier.template]


def logits(model):
    """Returns the logits of three texts and two images, exactly: every float32 is a float of JSON."""
    import torch
    from helpers import TINY_CLIP
    from transformers import AutoProcessor

    tokenizer = AutoProcessor.from_pretrained(TINY_CLIP).tokenizer
    texts = tokenizer([f"a photo of a {name}." for name in ("one", "two", "three")], padding=True, return_tensors="pt")
    size = model.config.vision_config.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(**texts, pixel_values=pixels).logits_per_image.tolist()


def load(loader, name, base=None, **arguments):
    """Loads a model by its id and returns its logits."""
    from peft import AutoPeftModel, PeftModel
    from transformers import CLIPModel, pipeline

    from capt_peft import ZeroShotClassifier

    if loader == "PeftModel":
        return logits(PeftModel.from_pretrained(CLIPModel.from_pretrained(base), name, **arguments))
    if loader == "AutoPeftModel":
        return logits(AutoPeftModel.from_pretrained(name, **arguments))
    if loader == "CLIPModel":
        return logits(CLIPModel.from_pretrained(name, **arguments))
    if loader == "pipeline":
        return logits(pipeline("zero-shot-image-classification", model=name, **arguments).model)
    return logits(ZeroShotClassifier.from_pretrained(name, **arguments).model)


def predictions(name):
    """Returns the scores of a pipeline and of our classifier, for one image."""
    from PIL import Image
    from transformers import pipeline

    from capt_peft import ZeroShotClassifier

    image = Image.effect_mandelbrot((40, 40), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    classifier = ZeroShotClassifier.from_pretrained(name)
    pipe = pipeline("zero-shot-image-classification", model=name)
    theirs = pipe(image, candidate_labels=list(classifier.class_names), hypothesis_template=classifier.template)
    return theirs, classifier.predict(image)[0]


def train(base, folder, name, token):
    """Tunes an adapter for two steps, with checkpoints, and pushes it as the Trainer does; returns its logits."""
    from transformers import AutoProcessor

    from capt_peft import CaptTrainer, CaptTrainingArguments, load_task

    task = load_task("digits").few_shot(2, seed=0)
    args = CaptTrainingArguments(
        folder, max_steps=2, attack_steps=1, save_strategy="steps", save_steps=1, use_cpu=True, disable_tqdm=True,
        push_to_hub=True, hub_model_id=name, hub_token=token, hub_private_repo=True, learning_rate=0.5,
    )  # fmt: skip
    trainer = CaptTrainer(new_adapter(base, 5), args, task=task, processor=AutoProcessor.from_pretrained(base))
    trainer.train()
    trainer.push_to_hub()
    return logits(trainer.classifier.model)


def train_script(*arguments):
    """Runs examples/train.py."""
    from capt_peft.commands.train import main

    main(list(arguments))


def command(name, *words):
    """Runs a command of the command line and returns what it printed."""
    from contextlib import redirect_stdout
    from importlib import import_module
    from io import StringIO

    from capt_peft.commands import COMMANDS, options

    told = StringIO()
    with redirect_stdout(told):
        import_module(f"capt_peft.commands.{name}").main(options.with_names(list(words), COMMANDS[name].given))
    return told.getvalue()


def serve():
    """Reads steps from stdin and answers on stdout, which nothing else may write to."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import logging

    logging.basicConfig(level=logging.DEBUG)
    import huggingface_hub
    import torch
    import transformers

    import capt_peft  # noqa: F401

    huggingface_hub.utils.logging.set_verbosity_debug()
    transformers.utils.logging.set_verbosity_debug()
    torch.set_num_threads(1)
    for line in sys.stdin:
        step, arguments, keywords = json.loads(line)
        try:
            answer = ["returned", globals()[step](*arguments, **keywords)]
        except Exception as error:
            logging.exception("The step %s failed", step)
            answer = ["raised", type(error).__name__, str(error), traceback.format_exc()]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
