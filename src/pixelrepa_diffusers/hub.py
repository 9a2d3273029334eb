"""Model cards whose figures have a source, and publishing to the Hub in one commit.

publish_folder("outputs/demo/pipeline", "me/digits")
with BackgroundPusher("me/digits") as pusher:                  # during training, on the main process
    pusher.push("outputs/demo/checkpoint-500/pipeline", revision="checkpoint-500")
"""

import hashlib
import importlib.metadata
import json
import logging
import queue
import re
import shlex
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    SpaceCardData,
)
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

from .cli import as_words
from .presets import matching_presets
from .transformer_jit import JiTTransformer2DModel


logger = logging.getLogger(__name__)

CARD_TEMPLATE = Path(__file__).with_name("model_card_template.md")
CARD_MARKER = "<!-- Written by pixelrepa_diffusers"  # a card with this text is replaced at the next publication

TASK = "unconditional-image-generation"  # the Hub's task for images without a prompt
TAGS = ("pixel-space", "image-generation", "diffusion", "flow-matching", "arxiv:2603.14366", "arxiv:2511.13720")
SHAPE = ("sample_size", "patch_size", "num_layers", "num_attention_heads", "attention_head_dim", "bottleneck_dim")

METHODS = {
    "none": "without alignment",
    "pixelrepa": "with PixelREPA (arXiv 2603.14366)",
    "repa": "with REPA (arXiv 2410.06940)",
    "irepa": "with iREPA (arXiv 2512.10794)",
}

# PixelREPA (arXiv 2603.14366): ImageNet 256², 50,000 samples, 600 epochs. (plain JiT, PixelREPA)
PAPER_RESULTS: dict[str, dict[str, tuple[float, float]]] = {
    "JiT-B/16": {"FID ↓": (3.66, 3.17), "Inception Score ↑": (275.1, 284.6)},
    "JiT-L/16": {"FID ↓": (2.36, 2.11), "Inception Score ↑": (298.5, 309.5)},
    "JiT-H/16": {"FID ↓": (1.86, 1.81), "Inception Score ↑": (303.4, 317.2)},
}

# Models of a pipeline and the code that loads them.
MODELS = {
    "transformer": "transformer_jit.py",
    "guidance_head": "guidance_jit.py",
    "guidance_transformer": "transformer_jit.py",
}
PUBLISHED_FILES = (
    *("model_index.json", "pipeline_pixelrepa.py", "training_arguments.json", "samples.png", "README.md"),
    *("modular_config.json", "modular_model_index.json", "modular_pixelrepa.py"),
    *(
        f"{part}/[!.]*.{suffix}"
        for part in (*MODELS, "scheduler", "adapter")
        for suffix in ("json", "py", "safetensors")
    ),
    "lora/[!.]*.safetensors",
)
LOCAL = "a local folder"  # published in place of a path
SPACE_GRADIO = "6.31.0"  # the release that the page is tested with
RETRY_WAITS = (2.0, 10.0, 30.0, 60.0)  # seconds between the tries of a publication

_FIGURE = re.compile(r"\b(fid|inception\s+score|images per second|images/s)\b", re.IGNORECASE)
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{16,}")
_PATH = re.compile(r'(?<=")[^",]*/[^",]*')
_LOGIN = "Log in with `hf auth login` or set HF_TOKEN. The token needs write permission for this repository."


class PublishError(OSError):
    """The Hub did not take a publication. The message says why and what to do; the repository is unchanged."""


# ------------------------------------------------------------------------------------------------------------ cards


def build_card(
    repo_id: str,
    transformer_config: Mapping[str, Any],
    pipeline_config: Mapping[str, Any],
    training: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    has_samples: bool = False,
    revision: str | None = None,
    description: str | None = None,
    objective: str | None = None,
    teacher: str | None = None,
    dataset: str | None = None,
    base_model: str | None = None,
    origin: str = "How these weights were trained is not recorded in this repository.",
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
) -> ModelCard:
    """
    Build the model card of a pipeline. Every figure on it comes from one of the arguments.

    Args:
        repo_id (`str`): Repository that the usage example loads.
        transformer_config, pipeline_config (`dict`): Content of transformer/config.json and model_index.json.
        training, metrics (`dict`, *optional*): Content of training_arguments.json and metrics.json.
        has_samples (`bool`, defaults to `False`): Whether samples.png lies beside the card.
        revision (`str`, *optional*): Branch that the usage example loads.
        description (`str`, *optional*): Free text below the summary. It may not state results.
        objective (`str`, *optional*): "pixelrepa", "repa", "irepa" or "none"; used where `training` does not say.
        teacher, dataset, base_model (`str`, *optional*): Name or Hub id of the teacher, of the training data, and of the
            fine-tuned pipeline. Default: the one in `training`, unless it is local.
        origin (`str`): Text in place of the training table when `training` is missing.
        license (`str`, *optional*): Licence identifier of the Hub. Without it the card states no licence.
        license_name, license_link (`str`, *optional*): Name of and link to the licence "other".

    Raises:
        ValueError: If the description states results.
    """
    if description and _FIGURE.search(description) and re.search(r"\d", description):
        raise ValueError(
            "The description states results without a source. Put measured figures into a metrics file instead."
        )
    training, metrics = training or {}, metrics or {}
    with torch.device("meta"):
        transformer = JiTTransformer2DModel.from_config(transformer_config)
    config, id2label = transformer.config, pipeline_config.get("id2label") or {}
    preset = next(iter(matching_presets({name: config[name] for name in SHAPE})), None)
    objective = training.get("objective", objective)
    teacher = (teacher or training.get("teacher_model_name_or_path")) if objective not in (None, "none") else None
    facts = {
        "title": repo_id.rpartition("/")[2],
        "conditioning": "Class-conditional" if config.num_classes > 1 else "Unconditional",
        "objective": objective,
        "base_model": _public_name(base_model or training.get("pretrained_model_name_or_path")),
        "dataset": _public_name(dataset or training.get("dataset_name")),
        "teacher": teacher,
        "measured": _rounded(metrics),
        "metrics": metrics,
    }
    return ModelCard.from_template(
        _metadata(facts, license=license, license_name=license_name, license_link=license_link),
        template_path=str(CARD_TEMPLATE),
        **facts,
        repo_id=repo_id,
        revision=revision,
        description=description,
        method=METHODS.get(objective),
        labels=_example_labels(id2label, config.num_classes),
        pipeline=pipeline_config,
        has_samples=has_samples,
        config=config,
        preset=preset,
        num_parameters=transformer.num_parameters(),
        training=training,
        origin=origin,
        teacher_name=_public_name(teacher),
        paper=PAPER_RESULTS.get(preset) if config.num_classes == 1000 else None,
        is_imagenet=config.num_classes == 1000 and "golden retriever" in id2label.values(),
        license=license,
    )


def _rounded(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Round the measured values: few samples do not support many digits."""
    digits = 4 if metrics.get("num_samples", 0) >= 10_000 else 3
    return {name: float(f"{value:.{digits}g}") for name, value in metrics.get("metrics", {}).items()}


def _example_labels(id2label: Mapping[str, str], num_classes: int) -> str | None:
    """Return the labels of the usage example as code: a name, if there is one, and an id."""
    if num_classes == 1:
        return None
    example = "207" if num_classes == 1000 else "0"
    first = id2label[example].partition(",")[0] if example in id2label else 0
    return json.dumps([first, num_classes - 1], ensure_ascii=False)


def _metadata(facts: Mapping[str, Any], **licence: str | None) -> ModelCardData:
    """Build the card's header, with links to the repositories that the Hub has."""
    base_model, dataset, teacher = (
        facts[name] if _is_hub_id(facts[name]) else None for name in ("base_model", "dataset", "teacher")
    )
    source = {
        "task_type": TASK,
        "dataset_type": dataset or "other",
        "dataset_name": facts["dataset"] or facts["metrics"].get("reference"),
    }
    results = [
        EvalResult(**source, metric_type=name, metric_name=name, metric_value=value)
        for name, value in facts["measured"].items()
    ]
    method = ["pixelrepa"] if facts["objective"] == "pixelrepa" else []
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["jit", *method, f"{facts['conditioning'].lower()}-image-generation", *TAGS],
        base_model=base_model,
        datasets=dataset and [dataset],
        teacher=teacher,
        metrics=list(facts["measured"]) or None,
        model_name=facts["title"] if results else None,
        eval_results=results or None,
        **licence,
    )


def card_for_folder(
    folder: str | Path, repo_id: str, metrics: str | Path | Mapping[str, Any] | None = None, **card_options
) -> ModelCard:
    """
    Build the model card of a saved pipeline from the files of its folder; `card_options` are arguments of [`build_card`].

    `metrics` is a metrics file or its content. Default: metrics.json of the folder.
    """
    folder = Path(folder)
    training = folder / "training_arguments.json"
    if (folder / "adapter").is_dir():  # kept by the conversion of a published checkpoint
        card_options = {
            "objective": "pixelrepa",
            "origin": "The weights were converted from a published PixelREPA checkpoint. They are the work of its authors, "
            "and their licence applies. No record of the training run is part of this repository.",
        } | card_options
    return build_card(
        repo_id,
        _read_json(folder / "transformer" / "config.json"),
        _read_json(folder / "model_index.json"),
        training=_read_json(training) if training.is_file() else None,
        metrics=metrics if isinstance(metrics, Mapping) else read_metrics(folder, metrics),
        has_samples=(folder / "samples.png").is_file(),
        **card_options,
    )


def read_metrics(folder: str | Path, path: str | Path | None = None) -> dict[str, Any] | None:
    """
    Read the measured results of a pipeline, as `pixelrepa-evaluate` writes them, without local paths.

    `path` is a metrics file, or the sweep.json of a sweep, which stands for its best cell. Default: metrics.json of `folder`,
    if it is there.

    Raises:
        ValueError: If the file does not name its source, or was measured with other weights.
    """
    if path is None and not (Path(folder) / "metrics.json").is_file():
        return None
    path = Path(path or Path(folder) / "metrics.json")
    record = _read_json(path)
    if "cells" in record:
        path = path.parent / record["best"]["folder"] / "metrics.json"
        logger.info(f"Taking the best cell of the sweep: {path}")
        record = _read_json(path)
    if missing := [name for name in ("metrics", "num_samples", "reference", "device") if not record.get(name)]:
        raise ValueError(
            f"{path} does not say {', '.join(missing)}. A figure needs its source: "
            '{"metrics": {"fid": 12.3}, "num_samples": 50000, "reference": "...", "device": "..."}.'
        )
    if record.get("weights_sha256") not in (None, weights_sha256(Path(folder) / "transformer")):
        raise ValueError(f"{path} was measured with other weights than those in {folder}: measure again.")
    text = json.dumps({name: record[name] for name in record if name not in ("arguments", "command")})
    return json.loads(_PATH.sub(lambda match: match[0] if _is_hub_id(match[0]) else Path(match[0]).name, text))


def weights_sha256(transformer: str | Path) -> str:
    """Hash the weights in a transformer's folder. A metrics.json names the weights it measured by this hash."""
    digest = hashlib.sha256()
    for path in sorted(Path(transformer).glob("[!.]*.safetensors")):
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def publishable(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a training run without paths of this machine."""
    paths = ("train_data_dir", "data_files", "cache_dir", "output_dir", "logging_dir", "teacher_cache_dir")
    paths += ("eval_reference", "resume_from_checkpoint")
    names = ("teacher_model_name_or_path", "pretrained_model_name_or_path", "dataset_name", "eval_network", "pipeline")
    facts = {name: value for name, value in arguments.items() if name not in paths}
    for name in names:
        value = facts.get(name)
        if value and (value.startswith(("/", ".", "~")) or Path(value).exists()):
            facts[name] = LOCAL
    return facts


def _is_hub_id(name: str | None) -> bool:
    return bool(name and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def _public_name(name: str | None) -> str | None:
    return None if name == LOCAL else name


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------- publishing


def published_files(
    folder: str | Path, repo_id: str, metrics: Mapping[str, Any] | None = None, **card_options
) -> dict[str, Path | bytes]:
    """
    Collect the files of a repository, by their paths in it: the pipeline with the code that loads it, its training
    arguments, samples, metrics and card. Checkpoints, logs and other files of the folder are not published.

    The card is built by [`card_for_folder`], unless the folder holds a README.md that this package did not write.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    index, required = folder / "model_index.json", ["model_index.json", "pipeline_pixelrepa.py"]
    parts = {"transformer", *(_read_json(index) if index.is_file() else ())}
    for part, code in MODELS.items():
        if part in parts:
            required += [f"{part}/config.json", f"{part}/{code}", f"{part}/[!.]*.safetensors"]
    if missing := [pattern for pattern in required if not any(folder.glob(pattern))]:
        raise FileNotFoundError(
            f"{folder} is not a complete saved pipeline: it has no {', '.join(missing)}. A training run saves one in "
            "pipeline/."
        )
    paths = [path for pattern in PUBLISHED_FILES for path in folder.glob(pattern)]
    places = (folder.resolve(), (folder / "../../blobs").resolve())  # a snapshot in the Hub's cache links to its blobs
    for path in paths:
        if not any(path.resolve().is_relative_to(place) for place in places):
            raise ValueError(f"{path} is a link out of the folder: replace it by a copy.")
    files: dict[str, Path | bytes] = {path.relative_to(folder).as_posix(): path for path in paths}
    if metrics:
        files["metrics.json"] = (json.dumps(metrics, indent=1, ensure_ascii=False) + "\n").encode()
    if "README.md" not in files or CARD_MARKER in files["README.md"].read_text(encoding="utf-8"):
        files["README.md"] = str(card_for_folder(folder, repo_id, metrics or {}, **card_options)).encode()
    for name, content in files.items():
        is_text = name.endswith((".json", ".md"))
        if is_text and _TOKEN.search(content if isinstance(content, bytes) else content.read_bytes()):
            raise ValueError(f"{name} contains an access token: take it out and revoke it.")
    return files


def publish_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    metrics: str | Path | None = None,
    **card_options,
) -> CommitInfo:
    """
    Publish a saved pipeline and its card in one commit, so that a repository always holds a complete pipeline.

    Weights that the folder no longer has, such as shards of another split, are deleted in the same commit. Publishing
    again without a change creates no commit. When the Hub does not answer or has an error of its own, it is tried again.

    Args:
        folder (`str` or `Path`): Folder written by `PixelREPAPipeline.save_pretrained`; it is only read.
        repo_id (`str`): "user/name", or "name" for the user of the token. Created when missing.
        private (`bool`, *optional*): Whether to create the repository private.
        token (`str`, *optional*): Access token with write permission. Default: HF_TOKEN or `hf auth login`.
        revision (`str`, *optional*, defaults to main): Branch to publish to; created from main when missing.
        metrics (`str` or `Path`, *optional*): Metrics file, see [`read_metrics`]. Default: metrics.json of the folder,
            or else of the repository if it was measured with these weights.
        card_options: Further arguments of [`build_card`], such as `license` and `description`.

    Raises:
        ValueError, FileNotFoundError: For a folder that cannot be published, before any request.
        PublishError: If the Hub refuses, or fails in every try. The repository is unchanged.
    """
    folder, api = Path(folder), HfApi(token=token)
    record = read_metrics(folder, metrics)
    published_files(folder, repo_id, record, **card_options)
    for seconds in (*RETRY_WAITS, None):
        try:
            return _commit(api, folder, repo_id, private, revision, record, card_options)
        except (HTTPError, LocalEntryNotFoundError, RuntimeError) as caught:
            # A failed upload of a file arrives wrapped in a RuntimeError.
            error = caught.__cause__ or caught if type(caught) is RuntimeError else caught
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else 500
            if status < 500 and status not in (408, 412, 429):
                raise PublishError(f"The Hub refused to publish {folder} to {repo_id}: {error}\n{_LOGIN}") from None
        if seconds is not None:
            logger.warning(f"Publishing to {repo_id} failed ({error}). The next try follows in {seconds:g} s.")
            time.sleep(seconds)
    raise PublishError(
        f"{folder} could not be published to {repo_id} in {len(RETRY_WAITS) + 1} tries: {error}\n"
        "The repository still holds its last complete commit. Publish again when the Hub answers."
    )


def _commit(api: HfApi, folder: Path, repo_id: str, private, revision, metrics, card_options) -> CommitInfo:
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision not in (None, "main"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    info = api.model_info(repo_id, revision=revision)
    remote = {file.rfilename for file in info.siblings}
    if metrics is None and "metrics.json" in remote:
        published = _read_json(Path(api.hf_hub_download(repo_id, "metrics.json", revision=info.sha)))
        if published.get("weights_sha256") == weights_sha256(folder / "transformer"):
            metrics = published
        else:
            logger.warning(f"The metrics.json in {repo_id} does not name these weights: removing it.")

    files = published_files(folder, repo_id, metrics, revision=revision, **card_options)
    replaced = {_unsharded(name) for name in files} | {"metrics.json"}
    stale = [name for name in remote if name not in files and _unsharded(name) in replaced]
    return api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=source) for name, source in files.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
        ],
        commit_message=f"Publish {folder.name}",
        revision=revision,
        parent_commit=info.sha,  # answered with 412 if somebody else has committed since; the next try looks again
    )


def space_files(repo_id: str, revision: str | None = None, license: str | None = None) -> dict[str, Path | bytes]:
    """
    Collect the files of a Space with the page of `pixelrepa-app` for a published pipeline: header, requirements, program and
    the code of this package.
    """
    package, arguments = Path(__file__).parent, {"pipeline": repo_id, "revision": revision}
    card = SpaceCardData(
        title=repo_id.rpartition("/")[2],
        sdk="gradio",
        sdk_version=SPACE_GRADIO,
        app_file="app.py",
        license=license,
        models=[repo_id],
    )
    program = (
        f"from pixelrepa_diffusers.commands.app import AppArguments, main\n\n\nmain(AppArguments(**{arguments}))\n"
    )
    required = [line for line in importlib.metadata.requires("pixelrepa-diffusers") if "extra ==" not in line]
    code = [path for path in sorted(package.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    return {
        "README.md": f"---\n{card.to_yaml()}\n---\n".encode(),
        "app.py": program.encode(),
        "requirements.txt": "".join(f"{line}\n" for line in required).encode(),
        **{f"{package.name}/{path.relative_to(package).as_posix()}": path for path in code},
    }


def publish_space(
    repo_id: str,
    space_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    license: str | None = None,
) -> CommitInfo:
    """Publish a Space with [`space_files`] in one commit; it is created when missing."""
    api = HfApi(token=token)
    space = {"repo_type": "space", "space_sdk": "gradio", "private": private, "exist_ok": True}
    return api.create_commit(
        api.create_repo(space_id, **space).repo_id,
        [CommitOperationAdd(name, source) for name, source in space_files(repo_id, revision, license).items()],
        commit_message=f"Page of {repo_id}",
        repo_type="space",
    )


def _unsharded(name: str) -> str:
    """Return the name that the weights of a shard or of an index have when they are not sharded."""
    name = re.sub(r"-\d{5}-of-\d{5}(?=\.safetensors$)", "", name)
    return re.sub(r"\.safetensors\.index(\.\w+)?\.json$", r"\1.safetensors", name)


class BackgroundPusher:
    """
    Publish folders from a background thread, for a training run that must neither wait nor fail.

    A push that fails for good is logged with the command that repeats it. Leaving the context manager waits up to ten
    minutes for queued pushes, but not when the run has failed.

    The arguments are those of [`publish_folder`]. The repository is created at once, so that a missing login shows before
    training.

    Raises:
        PublishError: If the token may not write to the repository, or the Hub does not answer.
    """

    def __init__(self, repo_id: str, *, private: bool | None = None, token: str | None = None, **card_options):
        api = HfApi(token=token)
        try:
            self.repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            api.auth_check(self.repo_id, write=True)  # `exist_ok` also accepts a repository of somebody else
        except HTTPError as error:
            raise PublishError(f"The Hub gives no access to {repo_id}: {error}\n{_LOGIN}") from None
        self._token, self._card_options = token, card_options
        self._queue: queue.SimpleQueue[tuple[Path, str | None]] = queue.SimpleQueue()
        self._pushes: dict[tuple[Path, str | None], Future] = {}
        threading.Thread(target=self._work, name="background-pusher", daemon=True).start()

    def push(self, folder: str | Path, revision: str | None = None) -> Future:
        """
        Queue a saved pipeline for a branch (default: main) and return at once. The future is done when it is published, or
        cannot be; do not change or delete the folder before.
        """
        job = (Path(folder), revision)
        self._pushes[job] = Future()
        self._queue.put(job)
        return self._pushes[job]

    def __enter__(self) -> "BackgroundPusher":
        return self

    def __exit__(self, exception_type, *_) -> None:
        _, unfinished = wait(self._pushes.values(), timeout=600.0 if exception_type is None else 0.0)
        for job, push in self._pushes.items():
            if push in unfinished:
                self._warn(job, "is not on the Hub yet.")

    def _warn(self, job: tuple[Path, str | None], problem: str) -> None:
        flags = as_words({"revision": job[1], **self._card_options})  # without the token
        command = shlex.join(["pixelrepa-publish", str(job[0]), self.repo_id, *flags])
        logger.warning(f"{job[0]} {problem}\nTo finish the job: {command}")

    def _work(self) -> None:
        while True:
            folder, revision = job = self._queue.get()
            push = self._pushes[job]
            try:
                commit = publish_folder(
                    folder, self.repo_id, token=self._token, revision=revision, **self._card_options
                )
            except Exception as error:  # the run continues whatever happens here
                self._warn(job, f"was not published: {error}")
                push.set_exception(error)
            else:
                logger.info(f"Published {folder}: {commit.commit_url}")
                push.set_result(commit)
