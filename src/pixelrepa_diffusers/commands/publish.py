"""A saved pipeline to the Hub, with its card, in one commit.

    hf auth login                                                  # once; or set HF_TOKEN
    python pipelines/publish.py FOLDER user/name --metrics metrics.json

Publishing again without a change uploads nothing. `--dry_run` shows the card and the files and sends nothing.
"""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from ..cli import run
from ..hub import PublishError, card_for_folder, pipeline_files, publish_folder


@dataclass
class PublishArguments:
    revision: str | None = field(default=None, metadata={"help": "Branch to publish to; created when missing."})
    private: bool = field(default=False, metadata={"help": "Create the repository private."})
    metrics: Path | None = field(default=None, metadata={"help": "Measured results (default: FOLDER/metrics.json)."})
    description: str | None = field(default=None, metadata={"help": "Text for the card; it may state no results."})
    license: str = field(default="apache-2.0", metadata={"help": "Of the weights, as the Hub spells it."})
    license_name: str | None = field(default=None, metadata={"help": "With --license other."})
    license_link: str | None = field(default=None, metadata={"help": "With --license other."})
    dry_run: bool = field(default=False, metadata={"help": "Show what would be published and stop."})


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(PublishArguments, description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="A folder written by save_pretrained.")
    parser.add_argument("repo_id", help="user/name, or name for your own.")
    args, positional = parser.parse_args_into_dataclasses(arguments)
    options = {**asdict(args), "private": args.private or None}  # None: what the user's or organisation's default is
    if options.pop("dry_run"):
        del options["private"]
        files = pipeline_files(positional.folder)  # what is wrong with the folder shows first
        print(card_for_folder(positional.folder, positional.repo_id, **options))
        print("Files:", *files, sep="\n  ")
        return
    try:
        print(publish_folder(positional.folder, positional.repo_id, **options).commit_url)
    except PublishError as error:
        raise SystemExit(str(error)) from None


def cli() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pixelrepa_diffusers").setLevel(logging.INFO)
    run(main)
