"""The Hub: model cards with sourced figures, publishing in one commit, and pushing in the background of a training run.

    publish_folder("outputs/demo/pipeline", "me/digits")             # what a folder holds, and its card
    with BackgroundPusher("me/digits") as pusher:                    # during training, on the main process
        pusher.push("outputs/demo/checkpoint-500/pipeline", revision="checkpoint-500")

A repository changes by one commit at a time: weights go to the Hub's storage first and become part of the repository
only with the commit that names them all, so whoever loads it finds the old pipeline or the new one.
"""

import hashlib
import json
import logging
import math
import queue
import re
import shlex
import threading
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from .presets import PRESETS


try:
    from httpx2 import TransportError
except ImportError:  # huggingface_hub before 2.0
    from httpx import TransportError

logger = logging.getLogger(__name__)

CARD_TEMPLATE = Path(__file__).with_name("model_card_template.md")
CARD_MARKER = (
    "<!-- Written by pixelrepa_diffusers from the files of this repository, again at each publication. "
    "Remove this line to keep a card of your own. -->"
)
MEASURED_HEADING = "Measured results"
PAPER_HEADING = "The paper's results"

# PixelREPA (arXiv 2603.14366): ImageNet 256², 50,000 samples, 600 epochs. (plain JiT, PixelREPA)
PAPER_RESULTS: dict[str, dict[str, tuple[float, float]]] = {
    "JiT-B/16": {"FID ↓": (3.66, 3.17), "Inception Score ↑": (275.1, 284.6)},
    "JiT-L/16": {"FID ↓": (2.36, 2.11), "Inception Score ↑": (298.5, 309.5)},
    "JiT-H/16": {"FID ↓": (1.86, 1.81), "Inception Score ↑": (303.4, 317.2)},
}

# What a card tells of a run, in this order: what shaped the weights, no paths of anybody's machine.
TRAINING_FACTS = (
    "objective", "alignment_weight", "mask_ratio", "teacher_model_name_or_path", "teacher_mode", "dataset_name",
    "dataset_config_name", "dataset_split", "max_train_samples", "resolution", "center_crop", "random_flip", "steps",
    "images_seen", "global_batch_size", "resolved_learning_rate", "lr_scheduler", "lr_warmup_steps", "adam_beta1",
    "adam_beta2", "adam_weight_decay", "max_grad_norm", "ema_decays", "label_drop_prob", "P_mean", "P_std",
    "mixed_precision", "seed", "num_processes", "device",
)  # fmt: skip

_METHODS = {
    None: "",
    "none": " trained without alignment",
    "pixelrepa": " trained with PixelREPA (arXiv 2603.14366)",
    "repa": " trained with REPA (arXiv 2410.06940)",
    "irepa": " trained with iREPA (arXiv 2512.10794)",
}

_SECRET_NAME = re.compile(r"(^|[-_])(token|secret|password|passwd|api[-_]?key|authorization)$", re.IGNORECASE)
_SECRET_TEXT = re.compile(r"hf_[A-Za-z0-9]{16,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)|(?<=Bearer )\S+")
_METRIC = re.compile(
    r"\bIS\b|\b(?i:s?fid|kid|fdd|cmmd|fd[- _]?dino\w*|inception[ _]score|precision|recall|accuracy|density|coverage"
    r"|clip[ _]score|(?:images|img|it|steps) ?(?:/|per) ?(?:s|sec|second))\b"
)
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.]*\w)", re.IGNORECASE)
_WEIGHTS = re.compile(r"(?P<stem>[^.]+?)(?:\.(?P<variant>\w+?))?(?:-\d{5}-of-\d{5})?\.safetensors")
_WEIGHTS_INDEX = re.compile(r"(?P<stem>[^.]+)\.safetensors\.index(?:\.(?P<variant>\w+))?\.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class PublishError(OSError):
    """Publishing failed. The message says why, what it means for the repository, and what finishes the job."""


@cache
def _imagenet_names() -> tuple[str, ...]:
    path = Path(__file__).with_name("imagenet_classes.json")
    return tuple(json.loads(path.read_text(encoding="utf-8"))["names"])


def imagenet_id2label() -> dict[int, str]:
    """
    ImageNet-1k class id to name, for the published presets: `{207: "golden retriever", ...}`.

    A name lists its synonyms separated by commas, and a pipeline takes each of them. Source: imagenet_classes.json.
    """
    return dict(enumerate(_imagenet_names()))


# ------------------------------------------------------------------------------------------------------------- secrets


def redact(value: Any, token: str | None = None) -> Any:
    """
    A copy of arguments or text without secrets, for whatever is logged, saved or published.

    Removed are the values of names that end in token, secret, password, api_key or authorization, and in every text
    access tokens of the Hub, passwords in URLs, `token`, and the token this machine is logged in with.

    Args:
        value: Text, or dicts, lists and tuples of anything.
        token (`str`, *optional*): A token in use.
    """
    if isinstance(value, Mapping):
        return {
            name: "<redacted>" if item and _SECRET_NAME.search(str(name)) else redact(item, token)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(redact(item, token) for item in value)
    if not isinstance(value, str):
        return value
    for secret in filter(None, (token, get_token())):
        value = value.replace(secret, "<redacted>")
    return _SECRET_TEXT.sub("<redacted>", value)


# --------------------------------------------------------------------------------------------------------------- cards


def build_card(
    repo_id: str,
    transformer_config: Mapping[str, Any],
    pipeline_config: Mapping[str, Any],
    training: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    num_parameters: int | None = None,
    has_samples: bool = False,
    revision: str | None = None,
    description: str | None = None,
    objective: str | None = None,
    teacher: str | None = None,
    dataset: str | None = None,
    origin: str = "How these weights were trained is not recorded in this repository.",
    license: str = "apache-2.0",
    license_name: str | None = None,
    license_link: str | None = None,
) -> ModelCard:
    """
    The card of a pipeline, every figure of it from a named source.

    Args:
        repo_id (`str`): Where the pipeline will be found, for the snippet.
        transformer_config, pipeline_config: As in transformer/config.json and model_index.json.
        training (*optional*): The arguments and outcome of the run (training_arguments.json).
        metrics (*optional*): Measured results (metrics.json): `{"metrics": {name: number}, "num_samples": ...,
            "reference": ..., "device": ...}`; further entries that fit on a line are shown as conditions.
        num_parameters (`int`, *optional*): Of the transformer.
        has_samples (`bool`): Whether a samples.png lies beside the card.
        revision (`str`, *optional*): The branch the snippet loads from.
        description (`str`, *optional*): Free text below the summary. Results are refused in it: they need a source.
        objective (`str`, *optional*): "pixelrepa", "repa", "irepa" or "none", where `training` does not say.
        teacher, dataset (`str`, *optional*): Hub ids, likewise.
        origin (`str`): What stands in the place of the training facts when there are none.
        license, license_name, license_link: As in the Hub's metadata; "other" needs a name and a link.

    Raises:
        `ValueError`: for metrics without their source or not finite, and for a figure in the text without one.
    """
    if license == "other" and not (license_name and license_link):
        raise ValueError('The license "other" needs `license_name` and `license_link`.')
    training = training or {}
    sizes = ("sample_size", "patch_size", "num_layers", "num_attention_heads", "attention_head_dim", "bottleneck_dim")
    preset = next(
        (
            name
            for name, record in PRESETS.items()
            if all(record.transformer_config()[size] == transformer_config.get(size) for size in sizes)
        ),
        None,
    )
    needed = (*sizes, "in_channels", "in_context_len", "num_classes", "noise_scale", "t_eps")
    for what, config, names in (
        ("transformer's", transformer_config, needed),
        ("pipeline's", pipeline_config, ("guidance_scale", "guidance_interval")),
    ):
        if absent := [name for name in names if name not in config]:
            raise ValueError(f"The {what} configuration lacks {', '.join(absent)}: save the pipeline again.")
    objective = training.get("objective", objective)
    if objective not in _METHODS:
        raise ValueError(f"The objective {objective!r} is none of {', '.join(map(str, _METHODS))}.")
    teacher = training.get("teacher_model_name_or_path", teacher) if objective not in (None, "none") else None
    dataset = training.get("dataset_name", dataset)
    id2label = pipeline_config.get("id2label")
    size, num_classes = transformer_config["sample_size"], transformer_config["num_classes"]
    title = repo_id.rpartition("/")[2]

    architecture = {
        "architecture": preset or "JiT",
        "parameters": None if num_parameters is None else f"{num_parameters:,}",
        "image": f"{size} × {size} × {transformer_config['in_channels']}",
        "patch": transformer_config["patch_size"],
        "blocks": transformer_config["num_layers"],
        "width": transformer_config["num_attention_heads"] * transformer_config["attention_head_dim"],
        "heads": transformer_config["num_attention_heads"],
        "in-context class tokens": transformer_config["in_context_len"],
        "classes": num_classes,
        "noise scale": transformer_config["noise_scale"],
        "t_eps": transformer_config["t_eps"],
    }
    measured, conditions = _read_metrics(metrics) if metrics is not None else ({}, {})
    paper = PAPER_RESULTS.get(preset, {}) if num_classes == 1000 else {}
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",  # the Hub's task for images without a prompt
        license=license,
        license_name=license_name,
        license_link=license_link,
        tags=[
            *(
                "jit",
                *(["pixelrepa"] if objective == "pixelrepa" else []),
                "class-conditional-image-generation",
                "pixel-space",
            ),
            *("image-generation", "diffusion", "flow-matching", "arxiv:2603.14366", "arxiv:2511.13720"),
        ],
        datasets=[dataset] if _is_hub_id(dataset) else None,
        teacher=teacher if _is_hub_id(teacher) else None,
        metrics=list(measured) or None,
        model_name=title if measured else None,
        eval_results=[
            EvalResult(
                task_type="unconditional-image-generation",
                dataset_type=dataset if _is_hub_id(dataset) else "other",
                dataset_name=str(conditions["reference"]),
                metric_type=name,
                metric_name=name,
                metric_value=value,
            )
            for name, value in measured.items()
        ]
        or None,
    )
    arguments = [json.dumps(repo_id), "trust_remote_code=True"]
    if revision is not None:
        arguments.insert(1, f"revision={json.dumps(revision)}")
    card = ModelCard.from_template(
        data,
        template_path=str(CARD_TEMPLATE),
        marker=CARD_MARKER,
        title=title,
        summary=f"Class-conditional {size} × {size} images straight from pixels: a JiT (arXiv 2511.13720){_METHODS[objective]}.",
        description=description,
        snippet=_snippet(", ".join(arguments), id2label, num_classes),
        guidance_scale=pipeline_config["guidance_scale"],
        guidance_interval=pipeline_config["guidance_interval"],
        has_samples=has_samples,
        architecture=[(name, value) for name, value in architecture.items() if value is not None],
        training=[(name, _text(training[name])) for name in TRAINING_FACTS if _is_fact(name, training.get(name))],
        origin=origin,
        measured_heading=MEASURED_HEADING,
        measured=[(name, f"{value:.6g}") for name, value in measured.items()],
        conditions=[(name, _text(value)) for name, value in conditions.items() if _fits_a_line(value)],
        paper_heading=PAPER_HEADING,
        paper=[(name, *values) for name, values in paper.items()],
        num_classes=num_classes,
        is_imagenet=bool(id2label) and id2label.get("207") == imagenet_id2label()[207],
        teacher=teacher if _is_hub_id(teacher) else "an image encoder" if teacher else None,
    )
    check_figures(
        card.content,
        {
            MEASURED_HEADING: {f"{value:.6g}" for value in measured.values()}
            | {number for item in conditions.items() for number in _NUMBER.findall(" ".join(map(_text, item)))},
            PAPER_HEADING: {str(value) for values in paper.values() for value in values},
        },
    )
    return card


def check_figures(card: str, sourced: Mapping[str, set[str]]) -> None:
    """
    Refuses a card in which a result has no source.

    A result is a number on a line that names a metric (FID, IS, precision, images/s, ...). It may stand only in a section
    of `sourced`, and only when its number is one of that section's.

    Args:
        card (`str`): The whole card.
        sourced: Section heading to the numbers that section's source holds, as they are printed.
    """
    body = re.sub(r"\A---\n.*?\n---\n|^```.*?^```$", "", card, flags=re.DOTALL | re.MULTILINE)
    heading = ""
    # A paragraph or a table at a time: a table names its metric once, above or beside the numbers.
    for block in re.split(r"\n\s*\n|\n(?=#)|(?<=\n)(#.*)\n", body):
        if not block:
            continue
        if block.lstrip().startswith("#"):
            heading = block.partition("\n")[0].strip("# \n")
        if _METRIC.search(block):
            unsourced = [number for number in _NUMBER.findall(block) if number not in sourced.get(heading, ())]
            if unsourced:
                raise ValueError(
                    f"The card would state a figure without a source: {', '.join(unsourced)} under {heading!r}, in "
                    f"{block.strip()!r}. Measured figures come from a metrics.json, the paper's from its table; take this "
                    "one out."
                )


def card_for_folder(folder: str | Path, repo_id: str, metrics: str | Path | None = None, **options) -> ModelCard:
    """
    The card of a saved pipeline, from its own files.

    Args:
        folder: The pipeline, with `training_arguments.json`, `metrics.json` and `samples.png` where there are any.
        repo_id (`str`): Where it will be found.
        metrics (*optional*): A file to read instead of the folder's metrics.json. Where it names the `weights_sha256` it
            was measured with, they must be the folder's.
        options: More arguments of [`build_card`].
    """
    folder = Path(folder)
    metrics = folder / "metrics.json" if metrics is None else Path(metrics)
    record = _read_json(metrics, missing_ok=metrics == folder / "metrics.json")
    if record is not None and record.get("weights_sha256") not in (None, weights_sha256(Path(folder) / "transformer")):
        raise ValueError(f"{metrics} was measured with other weights than those in {folder}: measure again.")
    return build_card(
        repo_id,
        _read_json(folder / "transformer" / "config.json"),
        _read_json(folder / "model_index.json"),
        training=_read_json(folder / "training_arguments.json", missing_ok=True),
        metrics=record,
        num_parameters=_count_parameters(folder / "transformer"),
        has_samples=(folder / "samples.png").is_file(),
        objective="pixelrepa" if (folder / "adapter").is_dir() else None,  # a converted checkpoint's
        **options,
    )


def weights_sha256(transformer: str | Path) -> str:
    """One digest of a transformer folder's weights, by which a metrics.json says what it measured."""
    digest = hashlib.sha256()
    for path in _weight_files(Path(transformer)):
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def _read_metrics(record: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """(name to value, everything else) of a metrics file that says where its figures come from."""
    missing = [name for name in ("metrics", "num_samples", "reference", "device") if not record.get(name)]
    if missing:
        raise ValueError(
            f"The metrics file does not say {' and '.join(map(repr, missing))}; a figure needs its source: "
            '{"metrics": {"fid": 12.3}, "num_samples": 50000, "reference": "...", "device": "..."}.'
        )
    if not isinstance(record["metrics"], Mapping):
        raise ValueError(f'The metrics file must hold "metrics", from names to numbers, got {record["metrics"]!r}.')
    for name, value in record["metrics"].items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"The metric {name!r} is {value!r}; it must be a finite number.")
    return dict(record["metrics"]), {name: value for name, value in record.items() if name != "metrics"}


def _snippet(arguments: str, id2label: Mapping[str, str] | None, num_classes: int) -> str:
    if id2label:
        favourite = "207" if num_classes == 1000 and "207" in id2label else next(iter(id2label))
        labels = [id2label[favourite].partition(",")[0], num_classes - 1]
    else:
        labels = [0, num_classes - 1]
    return "\n".join(
        (
            "import torch",
            "from diffusers import DiffusionPipeline",
            "",
            f"pipe = DiffusionPipeline.from_pretrained({arguments})",
            'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
            "seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]",
            f"images = pipe({json.dumps(labels, ensure_ascii=False)}, generator=seeds).images",
            'images[0].save("image.png")',
        )
    )


def _is_hub_id(name: Any) -> bool:
    return (
        isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()
    )


def _is_fact(name: str, value: Any) -> bool:
    # A teacher or data set may be a folder of somebody's machine.
    return value not in (None, "", []) and (
        name not in ("teacher_model_name_or_path", "dataset_name") or _is_hub_id(value)
    )


def _fits_a_line(value: Any) -> bool:
    return not isinstance(value, Mapping) and value is not None and len(_text(value)) <= 120


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("|", "\\|").replace("\n", " ")


# ---------------------------------------------------------------------------------------------------------- publishing


def pipeline_files(folder: str | Path) -> list[str]:
    """
    The files that make up a saved pipeline, checked: what publishing uploads besides the card.

    They are model_index.json, the components it names (and the adapter of a converted checkpoint), the code that loads
    them without this package, training_arguments.json, metrics.json and samples.png. Anything else in the folder, such
    as checkpoints and logs, is not published.

    Returns:
        Paths relative to the folder, with forward slashes.

    Raises:
        `ValueError` or `FileNotFoundError`: when a part is missing, damaged, a pickle, or outside the folder, and for
            weights that are not finite.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} is not a saved pipeline: it has no model_index.json.")
    index = _read_json(folder / "model_index.json")
    if not _is_component(index.get("_class_name")):
        raise ValueError(
            f"{folder / 'model_index.json'} does not name the pipeline's own code, so nobody could load it from the Hub. "
            "Save it again with PixelREPAPipeline.save_pretrained."
        )
    components = {name: part for name, part in index.items() if not name.startswith("_") and _is_component(part)}
    # Whoever made the folder chose these names, and what they name is read and sent out.
    for name in (*components, index["_class_name"][0], *(library for library, _ in components.values())):
        if not re.fullmatch(r"\w[\w.]*", name):
            raise ValueError(
                f"{folder / 'model_index.json'} names {name!r}; names of components and modules are made of letters, digits, "
                "'_' and '.', so that none leads out of the folder."
            )
    files = ["model_index.json", f"{index['_class_name'][0]}.py"]
    for name, (library, _) in components.items():
        if "_" in library:  # a module of ours, not a library such as diffusers
            files.append(f"{name}/{library}.py")
        if name == "transformer":
            files.append(f"{name}/config.json")
            _check_weights(folder / name)
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} is not a complete pipeline: it lacks {', '.join(missing)}.")

    for name in (*components, "adapter"):
        files += [path.relative_to(folder).as_posix() for path in (folder / name).rglob("*") if path.is_file()]
    files += ["training_arguments.json", "metrics.json", "samples.png"]
    files = sorted({file for file in files if (folder / file).is_file() and not Path(file).name.startswith(".")})
    inside = folder.resolve()
    places = (
        (inside, inside.parents[1] / "blobs") if len(inside.parents) > 1 else (inside,)
    )  # as the Hub's cache links
    for file in files:
        if file.endswith(_PICKLES):
            raise ValueError(f"{folder / file} may hold a pickle, which can run code; publish safetensors only.")
        target = (folder / file).resolve()
        if not any(target.is_relative_to(place) for place in places):
            raise ValueError(
                f"{folder / file} is a link to {target}, outside the folder: copy what is to be published."
            )
    return files


def publish_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    metrics: str | Path | None = None,
    attempts: int = 5,
    retry_wait: float = 2.0,
    **card_options,
) -> CommitInfo:
    """
    Publishes a saved pipeline and its card in one commit, or in none when the repository holds just that already.

    The folder itself is only read. A README.md in it without the line of [`CARD_MARKER`] is somebody's own card and is
    published as it is; otherwise the card is built anew. Weights of the published kind (variant) that the folder no
    longer has, such as shards of another split, go in the same commit; other files of the repository stay.

    Args:
        folder: A folder written by `PixelREPAPipeline.save_pretrained`.
        repo_id (`str`): "user/name", or "name" for the user the token belongs to. Created when missing.
        private (`bool`, *optional*): Create it private. A repository that exists keeps what it is.
        token (`str`, *optional*): An access token with write permission. Default: HF_TOKEN or `hf auth login`.
        revision (`str`, *optional*): The branch, created from main when missing. Default: main.
        metrics (*optional*): A metrics.json to publish with it, see [`build_card`]. Default: the folder's.
        attempts (`int`): Tries when the Hub does not answer, or answers with an error of its own.
        retry_wait (`float`): Seconds before the second try; doubled for each further one, up to a minute.
        card_options: `description`, `license`, `license_name`, `license_link`, see [`build_card`].

    Returns:
        [`~huggingface_hub.CommitInfo`] of the new commit, or of the latest one when nothing had to change.

    Raises:
        `ValueError`, `FileNotFoundError`: for a folder, card or name that cannot be published, before any request.
        [`PublishError`]: when the Hub refuses, or still fails after the last try. The repository is as it was.
    """
    folder = Path(folder)
    validate_repo_id(repo_id)
    files = {name: folder / name for name in pipeline_files(folder)}
    if metrics is not None:
        files["metrics.json"] = Path(metrics)
    own_card = folder / "README.md"
    keep_card = own_card.is_file() and CARD_MARKER not in own_card.read_text(encoding="utf-8")
    if keep_card:
        logger.info(f"Publishing {own_card} as it is.")
        files["README.md"] = own_card
    else:  # what is wrong with it shows here, before any request
        card_for_folder(folder, repo_id, metrics, revision=revision, **card_options)
    _refuse_secrets(files, token)

    api = HfApi(token=token)
    finish = publish_command(folder, repo_id, revision, private, metrics)
    for attempt in range(1, attempts + 1):
        try:
            full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision not in (None, "main"):
                api.create_branch(full_id, branch=revision, exist_ok=True)
            info = api.model_info(full_id, revision=revision)
            local: dict[str, Path | bytes] = dict(files)
            if not keep_card:
                card = card_for_folder(folder, full_id, metrics, revision=revision, **card_options)
                local["README.md"] = str(card).encode()
            stale = [file.rfilename for file in info.siblings if _is_stale(file.rfilename, files)]
            commit = api.create_commit(
                full_id,
                [
                    *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=source) for name, source in local.items()),
                    *(CommitOperationDelete(path_in_repo=name) for name in stale),
                ],
                commit_message=f"Publish {folder.name}",
                revision=revision,
                parent_commit=info.sha,  # somebody else's commit in between is answered 412, and we look again
            )
            changed = commit.oid != info.sha
            logger.info(f"{'Published' if changed else 'Nothing to change in'} {full_id}: {commit.commit_url}")
            return commit
        except (HfHubHTTPError, TransportError, RuntimeError) as caught:
            # The upload of a file wraps what went wrong in a RuntimeError.
            error = caught.__cause__ if type(caught) is RuntimeError else caught
            if not isinstance(error, HfHubHTTPError | TransportError):
                raise
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            reason = redact(str(error), token)
            if status is not None and status < 500 and status not in (408, 412, 429):
                raise PublishError(
                    f"The Hub refused to publish {folder} to {repo_id}: {reason}\n{_advice(error)}\n"
                    f"The repository is as it was. Then run: {finish}"
                ) from None
            if attempt == attempts:
                raise PublishError(
                    f"{folder} could not be published to {repo_id} in {attempts} tries. The last one: {reason}\n"
                    f"The repository holds its last complete commit. To finish the job: {finish}"
                ) from None
            wait = min(retry_wait * 2 ** (attempt - 1), 60.0)
            logger.warning(f"Publishing to {repo_id} failed ({reason}); try {attempt + 1} in {wait:g} s.")
            time.sleep(wait)
    raise ValueError(f"`attempts` must be at least 1, got {attempts}.")


def publish_command(
    folder: str | Path,
    repo_id: str,
    revision: str | None = None,
    private: bool | None = None,
    metrics: str | Path | None = None,
) -> str:
    """The command that publishes a folder. It names no token: log in with `hf auth login` or set HF_TOKEN."""
    command = ["python", "pipelines/publish.py", str(folder), repo_id]
    command += ["--revision", revision] if revision else []
    command += ["--private"] if private else []
    command += ["--metrics", str(metrics)] if metrics else []
    return shlex.join(command)


class BackgroundPusher:
    """
    Publishes folders one after another in a thread of its own, for a training run that must not wait and must not fail.

    `push` returns at once. A push that the Hub does not take is tried again; what fails for good is logged as a warning
    with the command that finishes the job, as is whatever is left when `finish` has waited long enough. The thread never
    keeps the process alive. Used as a context manager it finishes on leaving, without waiting if the run has failed.

    Args:
        repo_id (`str`): See [`publish_folder`], as for `private`, `token`, `attempts` and `retry_wait`.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        license: str | None = None,
        attempts: int = 6,
        retry_wait: float = 10.0,
    ):
        validate_repo_id(repo_id)
        try:
            repo_id = HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id
        except HfHubHTTPError as error:
            raise PublishError(f"The repository {repo_id} could not be created: {error}\n{_advice(error)}") from None
        self.repo_id, self.private = repo_id, private
        self._publish_options = {"private": private, "token": token, "attempts": attempts, "retry_wait": retry_wait}
        self._publish_options |= {"license": license} if license is not None else {}
        self._jobs: queue.Queue[tuple[Path, str | None]] = queue.Queue()
        self._unfinished: dict[tuple[Path, str | None], None] = {}  # an ordered set
        self._failed: dict[tuple[Path, str | None], None] = {}
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="background-pusher", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> set[Path]:
        """The folders that wait or are being uploaded: they must be neither changed nor deleted yet."""
        with self._changed:
            return {folder for folder, _ in self._unfinished}

    @property
    def failed(self) -> set[Path]:
        """The folders that could not be published; the commands that finish the job name them, so keep them."""
        with self._changed:
            return {folder for folder, _ in self._failed}

    def push(self, folder: str | Path, revision: str | None = None) -> None:
        """Queues a saved pipeline for a branch (default main) and returns at once."""
        job = (Path(folder), revision)
        with self._changed:
            self._unfinished[job] = None
            self._failed.pop(job, None)
        self._jobs.put(job)

    def finish(self, timeout: float = 600.0) -> list[str]:
        """
        Waits up to `timeout` seconds for what is queued.

        Returns:
            The commands that publish what has not been published, each logged as a warning; empty when all has.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._unfinished, timeout)
            left = list(self._unfinished)
            commands = [self._command(job) for job in (*self._failed, *left)]
        for job in left:
            logger.warning(f"{job[0]} is not on the Hub yet. To finish the job: {self._command(job)}")
        return commands

    def __enter__(self) -> "BackgroundPusher":
        return self

    def __exit__(self, exception_type, *_) -> None:
        self.finish(600.0 if exception_type is None else 0.0)

    def _command(self, job: tuple[Path, str | None]) -> str:
        return publish_command(job[0], self.repo_id, job[1], self.private)

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            failed = False
            try:
                publish_folder(job[0], self.repo_id, revision=job[1], **self._publish_options)
            except Exception as error:  # whatever it is, the run goes on and is told
                failed = True
                reason = redact(f"{type(error).__name__}: {error}", self._publish_options["token"])
                logger.warning(f"{job[0]} was not pushed: {reason}\nTo finish the job: {self._command(job)}")
            with self._changed:
                self._unfinished.pop(job, None)
                if failed:
                    self._failed[job] = None
                self._changed.notify_all()


def _read_json(path: Path, missing_ok: bool = False) -> dict[str, Any] | None:
    if missing_ok and not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also: no UTF-8, a number of thousands of digits, absurdly deep
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds a {type(content).__name__}.")
    return content


def _refuse_secrets(files: Mapping[str, Path], token: str | None) -> None:
    for path in files.values():
        if path.suffix in (".json", ".md", ".py", ".txt", ".yaml"):
            text = path.read_text(encoding="utf-8")
            content = _read_json(path) if path.suffix == ".json" else text
            if redact(content, token) != content:
                raise ValueError(
                    f"{path} contains an access token or a password. Take it out, and revoke it if it was shared."
                )


def _is_component(part: Any) -> bool:
    return isinstance(part, list) and len(part) == 2 and all(isinstance(item, str) for item in part)


def _shapes(path: Path) -> Iterator[list[int]]:
    with safe_open(path, framework="np") as file:
        for name in file.keys():  # noqa: SIM118, not a dict
            yield file.get_slice(name).get_shape()


def _weight_files(folder: Path) -> list[Path]:
    # A name that starts with a dot is a file somebody is still writing.
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))


def _check_weights(folder: Path) -> None:
    """Refuses a component without complete safetensors weights, or with numbers that no image comes from."""
    weights, shards = _weight_files(folder), set()
    for index in folder.glob("*.safetensors.index*.json"):
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(shard, str) and shard == Path(shard).name for shard in weight_map.values()
        ):
            raise ValueError(f'{index} must hold "weight_map", from tensor names to names of files beside it.')
        shards |= {folder / shard for shard in weight_map.values()}
    missing = [path.name for path in shards if not path.is_file()]
    if missing or not weights:
        raise FileNotFoundError(f"{folder} lacks weights: {', '.join(sorted(missing)) or 'no .safetensors file'}.")
    for path in weights:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, not a dict
                    tensor = file.get_tensor(name)
                    # Eight-bit types have no `isfinite` of their own.
                    if tensor.is_floating_point() and not tensor.float().isfinite().all():
                        raise ValueError(
                            f"{path}: the tensor {name!r} holds NaN or infinity; such weights make no image."
                        )
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}. Save the pipeline again.") from None


def _count_parameters(folder: Path) -> int:
    """The parameters of one variant of the weights in a folder."""
    by_variant: dict[str, int] = {}
    for path in _weight_files(folder):
        match = _WEIGHTS.fullmatch(path.name)
        variant = (match and match["variant"]) or ""
        by_variant[variant] = by_variant.get(variant, 0) + sum(map(math.prod, _shapes(path)))
    return by_variant[min(by_variant)]


def _is_stale(remote: str, files: Mapping[str, Path]) -> bool:
    """Whether a file of the repository holds weights that the folder's weights of the same kind have replaced."""

    def kind(name: str) -> tuple[str, str, str | None] | None:
        parent, _, file = name.rpartition("/")
        match = _WEIGHTS.fullmatch(file) or _WEIGHTS_INDEX.fullmatch(file)
        return (parent, match["stem"], match["variant"]) if match and parent else None

    return remote not in files and kind(remote) is not None and kind(remote) in {kind(name) for name in files}


def _advice(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401 or isinstance(error, RepositoryNotFoundError):
        return "Log in with `hf auth login`, or set HF_TOKEN to a token with write permission for this repository."
    if status == 403:
        return "The token has no write permission for this repository: use one that has, or another name."
    return "See the Hub's message above."
