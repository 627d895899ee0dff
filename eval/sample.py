"""Go on from a prompt with a trained model.

    python -m eval.sample RUN --prompt "Once upon a time"

RUN is a run folder, an artifact, a checkpoint, a folder that eval.hub.save wrote, or a hub id OWNER/NAME.
"""

from functools import partial

from common import CommandParser, run_command
from eval.hub import generate, load
from scoring.generate import Sampling


def main(argv: list[str] | None = None) -> None:
    """Print the text as it is drawn."""
    parser = CommandParser(prog="python -m eval.sample", description=__doc__)
    parser.add_argument("source", metavar="RUN", help="what to load the model from")
    parser.add_argument("--prompt", default="", help="text to continue; default: a document's start")
    parser.add_argument("--tokenizer", default="", help="tokenizer file or folder; default: that of the run")
    parser.add_argument("--dtype", default="", help="of activations; default: the recipe's")
    kinds = {"max_tokens": int, "temperature": float, "top_k": int, "top_p": float, "seed": int}
    for name, default in Sampling()._asdict().items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=kinds[name], default=default, help=f"default: {default}")
    args = parser.parse_args(argv)
    sampling = Sampling(*(getattr(args, name) for name in Sampling._fields))
    write = partial(print, end="", flush=True)
    write(args.prompt)
    generate(load(args.source, args.dtype, args.tokenizer), args.prompt, sampling, write)
    print()


if __name__ == "__main__":
    run_command(main)
