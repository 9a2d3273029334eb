"""Publish a saved pipeline and its model card to the Hub, in one commit.

    hf auth login                                                  # once; or set HF_TOKEN
    pixelrepa-publish FOLDER user/name --license mit --metrics metrics.json

Publishing again without a change uploads nothing. `--dry_run` shows the card and the files and sends nothing. For a
training checkpoint, the sampled weights are published as a pipeline.
"""

import contextlib
import json
import logging
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import HfArgumentParser

from ..cli import flag, run
from ..files import write_json
from ..hub import (
    LOCAL,
    publish_folder,
    publish_space,
    publishable,
    published_files,
    read_metrics,
    space_files,
)
from ..sampling import is_checkpoint, load_pipeline, read_progress


logger = logging.getLogger(__name__)


@dataclass
class PublishArguments:
    revision: str | None = flag(None, "Branch to publish to; created when missing.")
    private: bool = flag(False, "Create the repository private.")
    metrics: Path | None = flag(
        None,
        "Metrics file, or the sweep.json of a sweep for its best cell. Default: metrics.json of the folder, or the "
        "published one if it was measured with the same weights.",
    )
    description: str | None = flag(None, "Text for the card; it may not state results.")
    license: str | None = flag(None, "Licence of the weights, as the Hub spells it. Default: none is stated.")
    license_name: str | None = flag(None, "Name of the licence, with --license other.")
    license_link: str | None = flag(None, "Link to the licence, with --license other.")
    dataset: str | None = flag(None, "Name or Hub id of the training data, if the run read a local folder.")
    teacher: str | None = flag(None, "Name or Hub id of the teacher, if the run read a local folder.")
    base_model: str | None = flag(None, "Name or Hub id of the fine-tuned pipeline, if the run read a local folder.")
    space: str | None = flag(None, "Also publish a Space of this name with a page to try the pipeline on.")
    dry_run: bool = flag(False, "Show the card and the files, and send nothing.")


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(PublishArguments, description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="Saved pipeline or training checkpoint (checkpoint-N).")
    parser.add_argument("repo_id", help="user/name, or name for your own user.")
    args, positional = parser.parse_args_into_dataclasses(arguments)
    with contextlib.ExitStack() as stack:
        folder = positional.folder
        if is_checkpoint(folder):
            folder = save_checkpoint(folder, stack.enter_context(tempfile.TemporaryDirectory()))
        publish(folder, positional.repo_id, args)


def save_checkpoint(checkpoint: Path, parent: str) -> Path:
    """Save the pipeline of a training checkpoint, with the facts for its card."""
    folder, progress = Path(parent, checkpoint.resolve().name), read_progress(checkpoint)
    load_pipeline(checkpoint, "float32").save_pretrained(folder)
    facts = {**publishable(progress["arguments"]), "steps": progress["step"]}
    write_json(folder / "training_arguments.json", facts)
    return folder


def publish(folder: Path, repo_id: str, args: PublishArguments) -> None:
    options = asdict(args)
    dry_run, private, metrics = options.pop("dry_run"), options.pop("private"), options.pop("metrics")
    space = options.pop("space")
    files = published_files(folder, repo_id, read_metrics(folder, metrics), **options)
    card = files["README.md"]
    if isinstance(card, Path):
        logger.info(f"Publishing {card} as the card, unchanged.")
    else:
        card, facts = card.decode(), folder / "training_arguments.json"
        training = json.loads(facts.read_text(encoding="utf-8")) if facts.exists() else {}
        clues = {
            "--license": "No licence is stated" in card,
            "--dataset": "| data set |" not in card,
            "--base_model": training.get("pretrained_model_name_or_path") == LOCAL and not args.base_model,
            "--teacher": "frozen teacher (an image encoder)" in card,
        }
        if unstated := [name for name, is_unstated in clues.items() if is_unstated]:
            logger.warning(f"The card does not name everything. To name it: {', '.join(unstated)}.")
    if dry_run:
        print(card)
        print("Files:", *sorted(files), sep="\n  ")
        if space:
            print(f"Files of the Space {space}:", *space_files(repo_id, args.revision), sep="\n  ")
        return
    # None leaves the visibility to the default of the user or organisation.
    commit = publish_folder(folder, repo_id, metrics=metrics, private=private or None, **options)
    print(commit.commit_url)
    if space:
        settings = {"private": private or None, "revision": args.revision, "license": args.license}
        print(publish_space(commit.repo_url.repo_id, space, **settings).commit_url)


def cli() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pixelrepa_diffusers").setLevel(logging.INFO)
    run(main)
