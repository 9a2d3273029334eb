"""Model cards whose figures have a source, and publishing to the Hub in one commit.

publish_folder("outputs/demo/pipeline", "me/digits")
with BackgroundPusher("me/digits") as pusher:                  # during training, on the main process
    pusher.push("outputs/demo/checkpoint-500/pipeline", revision="checkpoint-500")
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
from collections.abc import Mapping
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
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open

from .presets import matching_presets


try:
    from httpx2 import TransportError
except ImportError:  # huggingface_hub before 2.0
    from httpx import TransportError

logger = logging.getLogger(__name__)

CARD_TEMPLATE = Path(__file__).with_name("model_card_template.md")
CARD_MARKER = "<!-- Written by pixelrepa_diffusers"  # a card with this text is replaced at the next publication

ARCHITECTURE = (
    "sample_size",
    "patch_size",
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "bottleneck_dim",
)

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

_FIGURE = re.compile(
    r"\bIS\b|\b(?i:s?fid|kid|fd[- _]?dino|inception score|(?<!mixed )precision|recall|images?(/| per )s)"
)
_SECRET = re.compile(r'\bhf_[A-Za-z0-9]{16,}|"[\w-]*(token|secret|password|api_key)"\s*:\s*"[^"]+"', re.IGNORECASE)
_LOCAL_PATH = re.compile(r"(?<!\S)([~.]{0,2}/[^,]*|(?!\w+://)[^\s,]+/[^\s,]+)")


class PublishError(OSError):
    """The Hub did not take a publication. The message says why and what to do; the repository is unchanged."""


# ------------------------------------------------------------------------------------------------------------ cards


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
        transformer_config (`dict`): Content of transformer/config.json.
        pipeline_config (`dict`): Content of model_index.json.
        training (`dict`, *optional*): Content of training_arguments.json.
        metrics (`dict`, *optional*): Content of metrics.json, see [`read_metrics`].
        num_parameters (`int`, *optional*): Number of parameters of the transformer.
        has_samples (`bool`, defaults to `False`): Whether samples.png lies beside the card.
        revision (`str`, *optional*): Branch that the usage example loads.
        description (`str`, *optional*): Free text below the summary. It may not state results.
        objective (`str`, *optional*): "pixelrepa", "repa", "irepa" or "none"; used where `training` does not say.
        teacher (`str`, *optional*): Name or Hub id of the teacher. Default: the one in `training`, unless it is local.
        dataset (`str`, *optional*): Name or Hub id of the training data, with the same default.
        base_model (`str`, *optional*): Name or Hub id of the fine-tuned pipeline, with the same default.
        origin (`str`): Text in place of the training table when `training` is missing.
        license (`str`, *optional*): Licence identifier of the Hub. Without it the card states no licence.
        license_name (`str`, *optional*): Name of the licence "other".
        license_link (`str`, *optional*): Link to the licence "other".

    Returns:
        [`~huggingface_hub.ModelCard`]

    Raises:
        ValueError: If the description states results, or the licence "other" lacks its name or link.
    """
    if license == "other" and not (license_name and license_link):
        raise ValueError('License "other" needs `license_name` and `license_link`.')
    if description and _FIGURE.search(description) and re.search(r"\d", description):
        raise ValueError(
            "The description states results without a source. Put measured figures into a metrics file instead."
        )
    training, metrics = training or {}, metrics or {}
    objective = training.get("objective", objective)
    teacher = (teacher or training.get("teacher_model_name_or_path")) if objective not in (None, "none") else None
    dataset = _public_name(dataset or training.get("dataset_name"))
    base_model = _public_name(base_model or training.get("pretrained_model_name_or_path"))
    id2label, num_classes = pipeline_config.get("id2label") or {}, transformer_config["num_classes"]
    preset = next(iter(matching_presets({name: transformer_config[name] for name in ARCHITECTURE})), None)
    title = repo_id.rpartition("/")[2]
    conditioning = "Class-conditional" if num_classes > 1 else "Unconditional"
    example = "207" if num_classes == 1000 else "0"
    labels = [id2label[example].partition(",")[0] if example in id2label else 0, num_classes - 1]
    measured = _rounded(metrics) if metrics else {}
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",  # the Hub's task for images without a prompt
        license=license,
        license_name=license_name,
        license_link=license_link,
        base_model=base_model if _is_hub_id(base_model) else None,
        tags=[
            *(["jit", "pixelrepa"] if objective == "pixelrepa" else ["jit"]),
            *(f"{conditioning.lower()}-image-generation", "pixel-space", "image-generation", "diffusion"),
            *("flow-matching", "arxiv:2603.14366", "arxiv:2511.13720"),
        ],
        datasets=[dataset] if _is_hub_id(dataset) else None,
        teacher=teacher if _is_hub_id(teacher) else None,
        metrics=list(measured) or None,
        model_name=title if measured else None,
        eval_results=[
            EvalResult(
                task_type="unconditional-image-generation",
                dataset_type=dataset if _is_hub_id(dataset) else "other",
                dataset_name=dataset or metrics["reference"],
                metric_type=name,
                metric_name=name,
                metric_value=value,
            )
            for name, value in measured.items()
        ]
        or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(CARD_TEMPLATE),
        title=title,
        repo_id=repo_id,
        revision=revision,
        description=description,
        conditioning=conditioning,
        method=METHODS.get(objective),
        labels=json.dumps(labels, ensure_ascii=False) if num_classes > 1 else None,
        guidance_scale=pipeline_config["guidance_scale"],
        guidance_interval=pipeline_config["guidance_interval"],
        self_guidance_scale=pipeline_config.get("self_guidance_scale"),
        autoguidance_scale=pipeline_config.get("autoguidance_scale"),
        has_samples=has_samples,
        config=transformer_config,
        preset=preset,
        num_parameters=num_parameters,
        training=training,
        origin=origin,
        base_model=base_model,
        dataset=dataset,
        teacher=teacher,
        teacher_name=_public_name(teacher),
        metrics=metrics,
        measured=measured,
        paper=PAPER_RESULTS.get(preset) if num_classes == 1000 else None,
        is_imagenet=num_classes == 1000 and "golden retriever" in id2label.values(),
        license=license,
    )


def card_for_folder(
    folder: str | Path, repo_id: str, metrics: str | Path | Mapping[str, Any] | None = None, **options
) -> ModelCard:
    """
    Build the model card of a saved pipeline from the files of its folder.

    Args:
        folder (`str` or `Path`): Saved pipeline, with training_arguments.json and samples.png where they exist.
        repo_id (`str`): Repository that the usage example loads.
        metrics (`str`, `Path` or `dict`, *optional*): Metrics file or its content. Default: metrics.json of the folder.
        options: Further arguments of [`build_card`].

    Returns:
        [`~huggingface_hub.ModelCard`]
    """
    folder = Path(folder)
    training = folder / "training_arguments.json"
    if (folder / "adapter").is_dir():  # kept by the conversion of a published checkpoint
        options = {
            "objective": "pixelrepa",
            "origin": "The weights were converted from a published PixelREPA checkpoint. They are the work of its authors, "
            "and their licence applies. No record of the training run is part of this repository.",
        } | options
    return build_card(
        repo_id,
        _read_json(folder / "transformer" / "config.json"),
        _read_json(folder / "model_index.json"),
        training=_read_json(training) if training.is_file() else None,
        metrics=metrics if isinstance(metrics, Mapping) else read_metrics(folder, metrics),
        num_parameters=_count_parameters(folder / "transformer"),
        has_samples=(folder / "samples.png").is_file(),
        **options,
    )


def read_metrics(folder: str | Path, path: str | Path | None = None) -> dict[str, Any] | None:
    """
    Read the measured results of a pipeline, as `pixelrepa-evaluate` writes them, without local paths.

    Args:
        folder (`str` or `Path`): Saved pipeline that was measured.
        path (`str` or `Path`, *optional*): Metrics file, or the sweep.json of a sweep, which stands for its best cell.
            Default: metrics.json of the folder.

    Returns:
        `dict` or `None`: `{"metrics": {name: value}, "num_samples": …, "reference": …, "device": …, …}`.

    Raises:
        ValueError: If the file does not name its source, or was measured with other weights.
    """
    if path is None and not (Path(folder) / "metrics.json").is_file():
        return None
    path = Path(path or Path(folder) / "metrics.json")
    record = _read_json(path)
    if "cells" in record:
        cells = {cell: _read_json(cell) for cell in sorted(path.parent.glob("*/metrics.json"))}
        path = next((cell for cell in cells if cells[cell]["metrics"].items() <= record["best"].items()), path)
        record = cells.get(path, {})
        logger.info(f"Taking the best cell of the sweep: {path}")
    if missing := [name for name in ("metrics", "num_samples", "reference", "device") if not record.get(name)]:
        raise ValueError(
            f"{path} does not say {', '.join(missing)}. A figure needs its source: "
            '{"metrics": {"fid": 12.3}, "num_samples": 50000, "reference": "...", "device": "..."}.'
        )
    if record.get("weights_sha256") not in (None, weights_sha256(Path(folder) / "transformer")):
        raise ValueError(f"{path} was measured with other weights than those in {folder}: measure again.")
    return _without_paths({name: record[name] for name in record if name not in ("arguments", "command")})


def weights_sha256(transformer: str | Path) -> str:
    """Hash the weights in a transformer's folder. A metrics.json names the weights it measured by this hash."""
    digest = hashlib.sha256()
    for path in _weight_files(Path(transformer)):
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def _rounded(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Round figures to the digits that the number of samples supports."""
    digits = 4 if metrics["num_samples"] >= 10_000 else 3
    return {name: float(f"{value:.{digits}g}") for name, value in metrics["metrics"].items()}


def _is_hub_id(name: str | None) -> bool:
    return bool(name and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def _public_name(name: str | None) -> str | None:
    """A Hub id or a plain name; None for a path, or for what the trainer writes in place of one."""
    return name if name and (_is_hub_id(name) or "/" not in name) and name != "a local folder" else None


def _without_paths(value: Any) -> Any:
    """Replace the local paths in a JSON value by their last part."""
    if isinstance(value, Mapping):
        return {name: _without_paths(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str):
        return _LOCAL_PATH.sub(lambda path: path[0] if _is_hub_id(path[0]) else Path(path[0]).name, value)
    return value


# ------------------------------------------------------------------------------------------------------- publishing


def pipeline_files(folder: str | Path) -> list[str]:
    """
    List the files of a saved pipeline that are published: the pipeline with the code that loads it, its training
    arguments, its samples and its README.md. Checkpoints, logs and other files are not.

    Raises:
        FileNotFoundError: If a part of the pipeline is missing.
        ValueError: If the folder holds no PixelREPA pipeline, or a link that leads out of it.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder} is not a saved pipeline: it has no model_index.json. A training run saves one in pipeline/."
        )
    if _read_json(folder / "model_index.json").get("_class_name") != ["pipeline_pixelrepa", "PixelREPAPipeline"]:
        raise ValueError(f"{folder} was not saved by PixelREPAPipeline.save_pretrained: the Hub could not load it.")
    needed = {"pipeline_pixelrepa.py", "transformer/config.json", "transformer/transformer_jit.py"}
    for part, module in (("guidance_head", "guidance_jit"), ("guidance_transformer", "transformer_jit")):
        if part in _read_json(folder / "model_index.json"):
            needed |= {f"{part}/config.json", f"{part}/{module}.py"}
    for index in folder.glob("transformer/*.index*.json"):
        needed |= {f"transformer/{Path(shard).name}" for shard in _read_json(index)["weight_map"].values()}
    if missing := sorted(name for name in needed if not (folder / name).is_file()):
        raise FileNotFoundError(f"{folder} is incomplete: it lacks {', '.join(missing)}.")

    files = {"model_index.json", "training_arguments.json", "samples.png", "README.md", *needed}
    for component in ("transformer", "scheduler", "adapter", "guidance_head", "guidance_transformer"):
        for suffix in ("json", "py", "safetensors"):
            files |= {f"{component}/{path.name}" for path in folder.glob(f"{component}/[!.]*.{suffix}")}
    files = sorted(name for name in files if (folder / name).is_file())
    # The cache of the Hub links to its blobs. Any other link could publish a private file.
    inside = (folder.resolve(), folder.resolve().parent.parent / "blobs")
    for name in files:
        if not any((folder / name).resolve().is_relative_to(place) for place in inside):
            raise ValueError(f"{folder / name} is a link that leads out of the folder: copy what is to be published.")
    return files


def published_files(
    folder: str | Path, repo_id: str, metrics: Mapping[str, Any] | None = None, **card_options
) -> dict[str, Path | bytes]:
    """
    Collect the files of a repository, by their paths in it: the pipeline, its metrics and its card.

    The card is built by [`card_for_folder`], unless the folder holds a README.md that this package did not write.
    """
    folder = Path(folder)
    files: dict[str, Path | bytes] = {name: folder / name for name in pipeline_files(folder)}
    if metrics:
        files["metrics.json"] = (json.dumps(metrics, indent=1, ensure_ascii=False) + "\n").encode()
    if "README.md" not in files or CARD_MARKER in (folder / "README.md").read_text(encoding="utf-8"):
        files["README.md"] = str(card_for_folder(folder, repo_id, metrics or {}, **card_options)).encode()
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
    Publish a saved pipeline and its card in one commit, so that a repository always holds a complete pipeline.

    Weights that the folder no longer has, such as shards of another split, are deleted in the same commit. Publishing
    again without a change creates no commit.

    Args:
        folder (`str` or `Path`): Folder written by `PixelREPAPipeline.save_pretrained`; it is only read.
        repo_id (`str`): "user/name", or "name" for the user of the token. Created when missing.
        private (`bool`, *optional*): Whether to create the repository private.
        token (`str`, *optional*): Access token with write permission. Default: HF_TOKEN or `hf auth login`.
        revision (`str`, *optional*, defaults to main): Branch to publish to; created from main when missing.
        metrics (`str` or `Path`, *optional*): Metrics file, see [`read_metrics`]. Default: metrics.json of the folder,
            or else of the repository if it was measured with these weights.
        attempts (`int`, defaults to 5): Tries when the Hub does not answer or has an error of its own.
        retry_wait (`float`, defaults to 2.0): Seconds before the second try; doubled for each further one, up to 60.
        card_options: Further arguments of [`build_card`], such as `license` and `description`.

    Returns:
        [`~huggingface_hub.CommitInfo`]: The new commit, or the latest one when nothing had to change.

    Raises:
        ValueError: For a folder that cannot be published, before any request.
        FileNotFoundError: For an incomplete folder, before any request.
        PublishError: If the Hub refuses, or fails in every try. The repository is unchanged.
    """
    folder = Path(folder)
    record = read_metrics(folder, metrics)
    _refuse_secrets(published_files(folder, repo_id, record, **card_options), token)
    api = HfApi(token=token)
    for attempt in range(1, attempts + 1):
        try:
            return _commit(api, folder, repo_id, private, revision, record, card_options)
        except (HfHubHTTPError, LocalEntryNotFoundError, TransportError, RuntimeError) as caught:
            # A failed upload of a file arrives wrapped in a RuntimeError.
            error = caught.__cause__ if type(caught) is RuntimeError else caught
            if not isinstance(error, HfHubHTTPError | LocalEntryNotFoundError | TransportError):
                raise
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if status is not None and status < 500 and status not in (408, 412, 429):
                raise PublishError(
                    f"The Hub refused to publish {folder} to {repo_id}: {error}\n{_advice(error)}"
                ) from None
            wait = min(retry_wait * 2 ** (attempt - 1), 60.0)
            if attempt < attempts:
                logger.warning(f"Publishing to {repo_id} failed ({error}). Try {attempt + 1} in {wait:g} s.")
                time.sleep(wait)
    raise PublishError(
        f"{folder} could not be published to {repo_id} in {attempts} tries: {error}\n"
        "The repository still holds its last complete commit. Publish again when the Hub answers."
    )


def create_repository(repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """
    Create a model repository unless it exists, and check that the token may write there.

    Returns:
        `str`: Full id of the repository, "user/name".

    Raises:
        PublishError: If the token may not write there, or the Hub does not answer.
    """
    try:
        api = HfApi(token=token)
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(full_id, write=True)  # `exist_ok` also accepts a repository that only others may write to
        return full_id
    except (HfHubHTTPError, TransportError) as error:
        raise PublishError(f"The Hub gives no access to {repo_id}: {error}\n{_advice(error)}") from None


def publish_command(folder: str | Path, repo_id: str, **options: str | None) -> str:
    """The shell command that publishes a folder. It holds no token: log in with `hf auth login` or set HF_TOKEN."""
    flags = [word for name, value in options.items() if value is not None for word in (f"--{name}", value)]
    return shlex.join(["pixelrepa-publish", str(folder), repo_id, *flags])


def _commit(
    api: HfApi,
    folder: Path,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    metrics: Mapping[str, Any] | None,
    card_options: Mapping[str, Any],
) -> CommitInfo:
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


class BackgroundPusher:
    """
    Publish folders from a background thread, for a training run that must neither wait nor fail.

    A push that fails for good is logged with the command that repeats it. Leaving the context manager waits for queued
    pushes, but not when the run has failed.

    Args:
        repo_id (`str`): Repository; created at once, so that a missing login shows before training.
        private (`bool`, *optional*): Whether to create the repository private.
        token (`str`, *optional*): Access token with write permission. Default: HF_TOKEN or `hf auth login`.
        attempts (`int`, defaults to 5): See [`publish_folder`].
        retry_wait (`float`, defaults to 10.0): See [`publish_folder`].
        card_options: Further arguments of [`build_card`], such as `license`.

    Raises:
        PublishError: If the repository could not be created.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        attempts: int = 5,
        retry_wait: float = 10.0,
        **card_options,
    ):
        self.repo_id = create_repository(repo_id, private, token)
        self._card_options = card_options
        self._options = {"token": token, "attempts": attempts, "retry_wait": retry_wait, **card_options}
        self._queue: queue.SimpleQueue[tuple[Path, str | None]] = queue.SimpleQueue()
        self._states: dict[tuple[Path, str | None], str] = {}  # "pending" or "failed", in the order of the pushes
        self._changed = threading.Condition()
        threading.Thread(target=self._work, name="background-pusher", daemon=True).start()

    @property
    def pending(self) -> set[Path]:
        """Folders that are queued or being uploaded: do not change or delete them."""
        return {folder for folder, _ in self._in_state("pending")}

    @property
    def failed(self) -> set[Path]:
        """Folders that could not be published: keep them for the logged commands."""
        return {folder for folder, _ in self._in_state("failed")}

    def push(self, folder: str | Path, revision: str | None = None) -> None:
        """Queue a saved pipeline for a branch (default: main) and return at once."""
        job = (Path(folder), revision)
        with self._changed:
            self._states[job] = "pending"
        self._queue.put(job)

    def finish(self, timeout: float = 600.0) -> list[str]:
        """
        Wait up to `timeout` seconds for what is queued.

        Returns:
            `list[str]`: The commands that publish what has not been published, each logged once as a warning.
        """
        with self._changed:
            self._changed.wait_for(lambda: "pending" not in self._states.values(), timeout)
        for job in self._in_state("pending"):
            logger.warning(f"{job[0]} is not on the Hub yet. To finish the job: {self._command(job)}")
        return [self._command(job) for job in self._in_state("failed", "pending")]

    def __enter__(self) -> "BackgroundPusher":
        return self

    def __exit__(self, exception_type, *_) -> None:
        self.finish(600.0 if exception_type is None else 0.0)

    def _in_state(self, *states: str) -> list[tuple[Path, str | None]]:
        with self._changed:
            return [job for job, state in self._states.items() if state in states]

    def _command(self, job: tuple[Path, str | None]) -> str:
        return publish_command(job[0], self.repo_id, revision=job[1], **self._card_options)

    def _work(self) -> None:
        while True:
            job = self._queue.get()
            try:
                commit = publish_folder(job[0], self.repo_id, revision=job[1], **self._options)
            except Exception as error:  # the run continues whatever happens here
                logger.warning(f"{job[0]} was not published: {error}\nTo finish the job: {self._command(job)}")
                outcome = "failed"
            else:
                logger.info(f"Published {job[0]}: {commit.commit_url}")
                outcome = "published"
            with self._changed:
                self._states[job] = outcome
                self._changed.notify_all()


def _refuse_secrets(files: Mapping[str, Path | bytes], token: str | None) -> None:
    for name, source in files.items():
        if not name.endswith((".safetensors", ".png")):
            text = (source if isinstance(source, bytes) else source.read_bytes()).decode()
            if _SECRET.search(text) or any(secret in text for secret in (token, get_token()) if secret):
                raise ValueError(f"{name} contains an access token or a password: take it out and revoke it.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("[!.]*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no safetensors weights.")
    return files


def _count_parameters(folder: Path) -> int:
    sizes = {}  # by name, because variants such as fp16 hold the same tensors
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="np") as file:
                sizes |= {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}. Save the pipeline again.") from None
    return sum(sizes.values())


def _unsharded(name: str) -> str:
    """Name of a weights file without its shard: shards and their index get the name of the unsharded file."""
    name = re.sub(r"-\d{5}-of-\d{5}(?=\.safetensors$)", "", name)
    return re.sub(r"\.safetensors\.index(\.\w+)?\.json$", r"\1.safetensors", name)


def _advice(error: Exception) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401 or isinstance(error, RepositoryNotFoundError):
        return "Log in with `hf auth login`, or set HF_TOKEN to a token with write permission for this repository."
    if status == 403:
        return "The token has no write permission for this repository: use one that has, or another name."
    return "See the message above."
