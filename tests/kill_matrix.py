"""What is left when a run is killed, stopped, cut off from its disk, or loses a process: trials, counted in a table.

    python tests/kill_matrix.py FOLDER --trials 125 --seed 0

Every trial starts an activity in a child, lets one fault strike at a random moment of the time the undisturbed activity
takes, looks whether everything under a final name is whole and as it should be, runs the same command again, and compares
the result with the undisturbed one bit by bit. Children are forked after the imports, so a trial costs what it computes.

The faults, of which a publication meets the last two on the Hub's side:
    SIGKILL     nothing runs after it
    SIGTERM     to the whole process group, as a cluster's preemption sends it
    Ctrl-C      SIGINT to the whole process group, as a terminal sends it
    full disk   a small tmpfs; where mounting is not permitted a limit on the size of files
    read-only   the output folder becomes read-only, in half of the trials before the start
    dead rank   SIGKILL to one of the two processes of a launched training run
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import functools
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
from standin_hub import StandInHub
from training_runs import (
    ROOT,
    TEACHER,
    arguments,
    ended,
    fork,
    load_script,
    train,
    two_process_command,
    weights,
    write_images,
)


FIXTURES = Path(__file__).parent / "fixtures"
LIMIT = 120  # seconds after which a run counts as hanging
# One of these an error must say, where a disk is full or a folder cannot be written.
CLEAR = {
    "full disk": ("No space left on device", "File too large", "could not be written", "507"),
    "read-only": ("Permission denied", "Read-only file system", "no write permission"),
}


class Damage(AssertionError):
    """A fault damaged something, or a restart did not mend it."""


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def tensors_sha256(tensors: dict) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def folder_sha256(folder: Path) -> dict[str, str]:
    """Of every file, the record of the run left out: it names its folder and versions."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "training_arguments.json"]
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()) for path in files}


# ---------------------------------------------------------------------------------------------------------- activities


class Activity:
    """A command that can be given again, what it has written so far, and what of that must not change."""

    name: str
    worked = 0.0  # seconds of processor time of the latest child
    stops_orderly = False  # on a signal, with exit status 0

    def __init__(self, folder: Path):
        self.folder = folder / self.name
        self.folder.mkdir()

    def prepare(self, place: Path) -> None:
        """Puts what an earlier run has left into `place`."""

    def run(self, place: Path) -> None:
        """The command, in a child."""
        raise NotImplementedError

    def finished(self, place: Path) -> dict:
        """Name → value of all that stands under a final name. Whatever does not load raises."""
        raise NotImplementedError

    def leftovers(self, place: Path) -> list[Path]:
        return [path for path in place.rglob(".*") if path.name != ".lock"]

    def measure(self) -> None:
        """Runs undisturbed: how much work it is, how much it writes, what comes of it."""
        place = self.place("undisturbed")
        started = time.perf_counter()
        self.attempt(place, "undisturbed")
        self.seconds, self.work = time.perf_counter() - started, self.worked
        self.bytes = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        self.expected = self.finished(place)
        self.allowed = self.expected

    def place(self, name: str) -> Path:
        place = self.folder / name
        place.mkdir()
        self.prepare(place)
        return place

    def log(self, place: Path) -> Path:
        return self.folder / f"{place.name}.log"

    def watch(self, child: int, place: Path, work: float = math.inf) -> int | None:
        """The exit status of a child, or None as soon as it has used `work` seconds of processor time.

        They tell a moment of its work better than a clock on a machine that has other things to do as well.
        """
        started, self.worked = time.monotonic(), 0.0
        while self.worked < work:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = psutil.Process(child).cpu_times()
                self.worked = max(self.worked, times.user + times.system)
            status = ended(child, 0.002)
            if status is not None:
                return status
            if time.monotonic() - started > LIMIT:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise Damage(f"{self.name} hangs:\n{self.log(place).read_text()[-4000:]}")
        return None

    def attempt(self, place: Path, what: str) -> None:
        status = self.watch(fork(lambda: self.run(place), self.log(place)), place)
        if status != 0:
            raise Damage(f"{what} of {self.name} ended with {status}:\n{self.log(place).read_text()[-4000:]}")

    def check(self, place: Path) -> None:
        """Everything under a final name is one of those of an undisturbed run."""
        for name, value in self.finished(place).items():
            if self.allowed.get(name) != value:
                raise Damage(f"{place}: {name} is {value}, undisturbed {self.allowed.get(name)}.")

    def check_end(self, place: Path) -> None:
        self.check(place)
        missing = self.expected.keys() - self.finished(place).keys()
        if missing or self.leftovers(place):
            raise Damage(f"{place} lacks {sorted(missing)} and still has {self.leftovers(place)}.")


class Training(Activity):
    name = "training"
    stops_orderly = True

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.data = write_images(self.folder / "data")

    def words(self, place: Path, **overrides) -> list[str]:
        settings = {
            "max_train_steps": 8,
            "checkpointing_steps": 2,
            "validation_steps": 4,
            "logging_steps": 1,
            "dataloader_num_workers": 1,
            "resume_from_checkpoint": "latest",
        }
        return arguments(self.data, place / "run", **{**settings, **overrides})

    def run(self, place: Path) -> None:
        train(self.words(place))

    def measure(self) -> None:
        super().measure()
        # A signal makes a checkpoint at any step: those of a run that keeps them all are right as well.
        place = self.place("every-step")
        everything = fork(lambda: train(self.words(place, checkpointing_steps=1)), self.log(place))
        assert ended(everything, LIMIT) == 0, self.log(place).read_text()[-4000:]
        self.allowed = self.finished(place)
        assert self.expected.items() <= self.allowed.items(), "two undisturbed runs differ"

    def finished(self, place: Path) -> dict:
        from pixelrepa_diffusers import PixelREPAPipeline
        from pixelrepa_diffusers.training.checkpoints import list_checkpoints, verify

        run, found = place / "run", {}
        for checkpoint in list_checkpoints(run):
            verify(checkpoint)
            found[checkpoint.name] = tensors_sha256(weights(checkpoint))
        for path in (*run.glob("samples/*.png"), *run.glob("curves.png")):
            found[path.name] = sha256(path.read_bytes())
        if (run / "pipeline").exists():
            PixelREPAPipeline.from_pretrained(run / "pipeline")
            found |= folder_sha256(run / "pipeline")
        if (run / "metrics.jsonl").exists():
            for line in (run / "metrics.jsonl").read_text().splitlines():
                if line.endswith("}"):  # the last may be cut: the next start drops it
                    row = json.loads(line)
                    found[f"step {row['step']}"] = [row[key] for key in ("loss", "grad_norm", "learning_rate")]
        if (run / "arguments.json").exists():
            json.loads((run / "arguments.json").read_text())
        return found


class TrainingOfTwo(Training):
    """Two processes, started by accelerate; only a dead rank strikes here."""

    name = "training on two"

    def run(self, place: Path) -> None:
        raise NotImplementedError("it is launched, not forked")

    def words(self, place: Path, **overrides) -> list[str]:
        return super().words(place, train_batch_size=2, **overrides)

    def launch(self, place: Path) -> subprocess.Popen:
        command, environment = two_process_command(ROOT / "training/train_pixelrepa.py", self.words(place))
        output = self.log(place).open("a")
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=output, stderr=output)

    def attempt(self, place: Path, what: str) -> None:
        launcher = self.launch(place)
        status = launcher.wait(LIMIT)
        record = place / "run/pipeline/training_arguments.json"
        if status != 0 or json.loads(record.read_text())["num_processes"] != 2:
            raise Damage(f"{what} of {self.name} ended with {status}:\n{self.log(place).read_text()[-4000:]}")

    def measure(self) -> None:
        Activity.measure(self)


class Conversion(Activity):
    """A published checkpoint to a pipeline and that back to a checkpoint, twice."""

    name = "conversion"

    def run(self, place: Path) -> None:
        from transformers import HfArgumentParser

        from pixelrepa_diffusers.commands.convert_checkpoint import ConvertArguments, main

        def convert(*words) -> None:
            main(HfArgumentParser(ConvertArguments).parse_args_into_dataclasses([str(word) for word in words])[0])

        source = FIXTURES / "reference_a/checkpoint-last.pth"
        for kind in ("ema1", "ema2"):
            pipe, back = place / f"pipe-{kind}", place / f"{kind}.pth"
            if not pipe.exists():  # what exists is refused, and is finished
                words = ("--checkpoint_path", source, "--output_dir", pipe, "--in_context_start", 2)
                convert(*words, "--weights", kind)
            if not back.exists():
                convert("--to_original", "--pipeline", pipe, "--output_path", back)

    def finished(self, place: Path) -> dict:
        from pixelrepa_diffusers import PixelREPAPipeline
        from pixelrepa_diffusers.adapter import MaskedTransformerAdapter
        from pixelrepa_diffusers.conversion import read_original_checkpoint

        found = {}
        for pipe in place.glob("pipe-*"):
            PixelREPAPipeline.from_pretrained(pipe)
            MaskedTransformerAdapter.from_pretrained(pipe / "adapter")
            found |= {f"{pipe.name}/{name}": value for name, value in folder_sha256(pipe).items()}
        for path in place.glob("*.pth"):
            checkpoint = read_original_checkpoint(path)
            found[f"{path.name} args"] = vars(checkpoint["args"])
            for part in ("model", "model_ema1", "model_ema2"):
                found[f"{path.name} {part}"] = tensors_sha256(checkpoint[part])
        return found


def tiny_pipeline(seed: int, num_classes: int):
    """A pipeline whose weights are all random: a fresh one ignores its labels."""
    import torch

    from pixelrepa_diffusers import JiTFlowMatchScheduler, JiTTransformer2DModel, PixelREPAPipeline

    torch.manual_seed(seed)
    transformer = JiTTransformer2DModel(
        sample_size=16, patch_size=4, num_layers=3, num_attention_heads=2, attention_head_dim=16, bottleneck_dim=8,
        in_context_len=2, in_context_start=1, num_classes=num_classes,
    )  # fmt: skip
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return PixelREPAPipeline(transformer.eval(), JiTFlowMatchScheduler(), guidance_scale=2.0)


class Generation(Activity):
    """Images beside those of an earlier run."""

    name = "generation"

    def __init__(self, folder: Path):
        super().__init__(folder)
        tiny_pipeline(0, 10).save_pretrained(self.folder / "pipeline")
        self.earlier = self.folder / "earlier"
        assert ended(fork(lambda: self.generate(self.earlier, 5, "0-3", 0), self.folder / "earlier.log"), LIMIT) == 0

    def generate(self, output: Path, label: int, seeds: str, max_grid_images: int) -> None:
        from transformers import HfArgumentParser

        from pixelrepa_diffusers.commands.generate import GenerateArguments, main

        words = ["--pipeline", self.folder / "pipeline", "--output_dir", output, "--class_labels", label]
        words += ["--seeds", seeds, "--num_inference_steps", 5, "--batch_size", 2, "--overwrite"]
        words += ["--max_grid_images", max_grid_images]
        main(HfArgumentParser(GenerateArguments).parse_args_into_dataclasses([str(word) for word in words])[0])

    def prepare(self, place: Path) -> None:
        shutil.copytree(self.earlier, place / "images")

    def run(self, place: Path) -> None:
        self.generate(place / "images", 7, "0-15", 256)

    def finished(self, place: Path) -> dict:
        json.loads((place / "images/arguments.json").read_text())
        found = {path.name: sha256(path.read_bytes()) for path in place.glob("images/*.png")}
        if len([name for name in found if name.startswith("0005_")]) != 4:
            raise Damage(f"{place}: images of the earlier run are gone.")
        return found


class Evaluation(Activity):
    """A sweep of two cells, one of which an earlier run has finished."""

    name = "evaluation"

    def __init__(self, folder: Path):
        from tiny import encoder, random_images, reference_of

        super().__init__(folder)
        tiny_pipeline(0, 10).save_pretrained(self.folder / "pipeline")
        reference_of(encoder(), random_images(40)).save(self.folder / "reference.npz")
        self.earlier = self.folder / "earlier"
        assert ended(fork(lambda: self.evaluate(self.earlier, 1, 3), self.folder / "earlier.log"), LIMIT) == 0
        shutil.rmtree(next(self.earlier.glob("*guidance-3")))

    def evaluate(self, output: Path, *scales: float) -> None:
        from transformers import HfArgumentParser

        from pixelrepa_diffusers.commands.evaluate import EvaluateArguments, main

        words = ["--pipeline", self.folder / "pipeline", "--output_dir", output, "--metrics", "fd_teacher"]
        words += ["--teacher", TEACHER, "--teacher_image_size", 28, "--num_samples", 60, "--num_inference_steps", 4]
        words += ["--teacher_reference", self.folder / "reference.npz", "--batch_size", 4, "--chunk_size", 8]
        words += ["--guidance_scales", *scales]
        main(HfArgumentParser(EvaluateArguments).parse_args_into_dataclasses([str(word) for word in words])[0])

    def prepare(self, place: Path) -> None:
        shutil.copytree(self.earlier, place / "sweep")

    def run(self, place: Path) -> None:
        self.evaluate(place / "sweep", 1, 3)

    def finished(self, place: Path) -> dict:
        found = {}
        for path in place.glob("sweep/*/metrics.json"):
            found[str(path.relative_to(place))] = json.loads(path.read_text())["metrics"]
        for path in place.glob("sweep/**/*.png"):
            found[str(path.relative_to(place))] = sha256(path.read_bytes())
        for path in place.glob("sweep/*/state.npz"):
            with np.load(path) as state:
                dict(state)
        for row in csv.DictReader((place / "sweep/sweep.csv").open()):
            found[f"row {row['guidance_scale']}"] = row["fd_teacher"]
        found["table"] = len(json.loads((place / "sweep/sweep.json").read_text())["cells"]) >= 1
        if not list(place.glob("sweep/*guidance-1/metrics.json")):
            raise Damage(f"{place}: the earlier cell is gone.")
        return found

    def leftovers(self, place: Path) -> list[Path]:
        return [*super().leftovers(place), *place.rglob("state.npz")]


class Publishing(Activity):
    """A second version over a first; each trial has a repository of its own, named after its place."""

    name = "publishing"

    def __init__(self, folder: Path, hub: StandInHub):
        super().__init__(folder)
        self.hub = hub
        for version in (0, 1):
            pipeline = tiny_pipeline(version, 10)
            pipeline.save_pretrained(self.folder / f"pipeline-{version}", max_shard_size=("10GB", "40KB")[version])

    def publish(self, place: Path, version: int) -> None:
        import huggingface_hub.utils._http as http

        from pixelrepa_diffusers.hub import PublishError, publish_folder

        # The client waits seconds between its tries.
        http.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: time.sleep(0.001)})
        try:
            publish_folder(self.folder / f"pipeline-{version}", f"me/{place.name}", attempts=2, retry_wait=0.01)
        except PublishError as error:
            raise SystemExit(str(error)) from None

    def prepare(self, place: Path) -> None:
        assert ended(fork(lambda: self.publish(place, 0), self.log(place)), LIMIT) == 0, self.log(place).read_text()
        self.first = self.finished(place)

    def run(self, place: Path) -> None:
        self.publish(place, 1)

    def finished(self, place: Path) -> dict:
        files = self.hub.files(f"me/{place.name}")
        del files["README.md"]  # it names the repository
        return {name: sha256(content) for name, content in files.items()}

    def check(self, place: Path) -> None:
        if self.finished(place) not in (self.first, self.expected):
            raise Damage(f"me/{place.name} is neither the first nor the second version: {self.finished(place)}")

    def check_end(self, place: Path) -> None:
        if self.finished(place) != self.expected:
            raise Damage(f"me/{place.name} is not the second version: {self.finished(place)}")


# -------------------------------------------------------------------------------------------------------------- faults

# A fault makes `place`, lets the activity run and strikes. It returns the exit status, None when it came too late, and what
# makes room for the restart.
Outcome = tuple[int | None, Callable[[], object]]


def run_as(activity: Activity, place: Path, hindrance: Callable[[], object]) -> int:
    """The whole run of a child that first does something to itself."""
    return activity.watch(fork(lambda: (hindrance(), activity.run(place)), activity.log(place)), place)


def signal_strikes(activity: Activity, name: str, draw: random.Random, stack, number: int) -> Outcome:
    place = activity.place(name)
    child = fork(lambda: activity.run(place), activity.log(place))
    if activity.watch(child, place, draw.uniform(0, activity.work)) is not None:
        return None, place.exists
    if number == signal.SIGKILL:
        os.kill(child, number)
    else:
        os.killpg(child, number)
    return activity.watch(child, place), place.exists


def disk_fills(activity: Activity, name: str, draw: random.Random, stack: contextlib.ExitStack) -> Outcome:
    if isinstance(activity, Publishing):
        place, hub, full = activity.place(name), activity.hub, draw.randint(1, 12)
        hub.reset()
        hub.fault = lambda number, method, path: 507 if number >= full and method != "GET" else None
        stack.callback(hub.reset)
        return run_as(activity, place, lambda: None), hub.reset
    if not may_mount():
        place = activity.place(name)
        sizes = [path.stat().st_size for path in activity.folder.glob("undisturbed/**/*") if path.is_file()]
        limit = int(draw.uniform(0, 0.9) * max(sizes))
        limits = limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        return run_as(activity, place, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)), place.exists
    place = activity.folder / name
    place.mkdir()
    earlier = sum(path.stat().st_blocks * 512 for path in getattr(activity, "earlier", place).rglob("*"))
    size = earlier + 4096 + int(draw.uniform(0, 0.9) * (activity.bytes - earlier))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    stack.callback(subprocess.run, ["umount", "-l", place], check=True)
    activity.prepare(place)
    enlarge = ["mount", "-o", "remount,size=256m", str(place)]
    return run_as(activity, place, lambda: None), lambda: subprocess.run(enlarge, check=True)


@functools.cache
def may_mount() -> bool:
    command = "d=$(mktemp -d) && mount -t tmpfs tmpfs $d && umount $d && rmdir $d"
    return subprocess.run(["sh", "-c", command], capture_output=True).returncode == 0


def folder_is_locked(activity: Activity, name: str, draw: random.Random, stack: contextlib.ExitStack) -> Outcome:
    place = activity.place(name)
    if isinstance(activity, Publishing):
        return run_as(activity, place, lambda: os.environ.update(HF_TOKEN=activity.hub.read_token)), place.exists

    def ordinary_user() -> None:
        """root may write everywhere, whatever the permissions say, until it gives that capability up."""
        if os.geteuid() == 0:
            version_3 = (ctypes.c_uint32 * 2)(0x20080522, 0)  # see capset(2)
            if ctypes.CDLL(None).capset(version_3, (ctypes.c_uint32 * 6)()):
                raise OSError("capset failed")

    moment = draw.choice((0, draw.uniform(0, activity.work)))
    if moment == 0:
        set_writable(place, False)
    child = fork(lambda: (ordinary_user(), activity.run(place)), activity.log(place))
    status = activity.watch(child, place, moment)
    set_writable(place, False)
    if status is None:
        status = activity.watch(child, place)
    return status, lambda: set_writable(place, True)


def set_writable(place: Path, writable: bool) -> None:
    for path in (place, *place.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # a run that goes on removes files
            mode = path.stat().st_mode
            path.chmod(mode | 0o200 if writable else mode & ~0o222)


def rank_dies(activity: TrainingOfTwo, name: str, draw: random.Random, stack: contextlib.ExitStack) -> Outcome:
    place = activity.place(name)
    launcher = activity.launch(place)
    ranks = []
    while len(ranks) < 2 and launcher.poll() is None:
        time.sleep(0.05)
        ranks = [
            child for child in psutil.Process(launcher.pid).children() if "train_pixelrepa.py" in str(child.cmdline())
        ]
    try:
        launcher.wait(draw.uniform(0, activity.seconds))
        return None, place.exists
    except subprocess.TimeoutExpired:
        with contextlib.suppress(psutil.NoSuchProcess):  # too late, the launcher alone is left
            draw.choice(ranks).kill()
    status = launcher.wait(LIMIT)
    if status == 0 and not (place / "run/pipeline").exists():
        raise Damage(f"{place}: a rank died and the launcher says that all is well.")
    return status, place.exists


FAULTS = {
    "SIGKILL": functools.partial(signal_strikes, number=signal.SIGKILL),
    "SIGTERM": functools.partial(signal_strikes, number=signal.SIGTERM),
    "Ctrl-C": functools.partial(signal_strikes, number=signal.SIGINT),
    "full disk": disk_fills,
    "read-only": folder_is_locked,
    "dead rank": rank_dies,
}


# --------------------------------------------------------------------------------------------------------------- trials


def trial(activity: Activity, fault: str, number: int, draw: random.Random) -> str | None:
    """One trial: what the disturbed run ended with, None when the fault came too late."""
    name = f"{fault.replace(' ', '-').lower()}-{number}"
    place = activity.folder / name
    with contextlib.ExitStack() as stack:
        status, mend = FAULTS[fault](activity, name, draw, stack)
        activity.check(place)
        mend()
        if status is None or (status == 0 and not (activity.stops_orderly and fault in ("SIGTERM", "Ctrl-C"))):
            return None
        log = activity.log(place).read_text(errors="replace")
        if fault in CLEAR and not any(text in log for text in CLEAR[fault]):
            raise Damage(f"{place}: a run ends with {status} and an unclear message:\n{log[-3000:]}")
        activity.attempt(place, "the restart")
        activity.check_end(place)
    shutil.rmtree(place)
    message = [line for line in log.splitlines() if line.strip()][-1:]
    return f"{status}: {''.join(message)}"


def check_processes() -> None:
    """Nothing that a trial started outlives it by more than the seconds after which loader processes miss their trainer."""
    deadline = time.monotonic() + 20
    while True:
        own = psutil.Process()
        same = [each for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"] == own.cmdline()]
        if same == [own]:
            return
        if time.monotonic() > deadline:
            raise Damage(f"Processes of killed runs are still there: {same}")
        time.sleep(0.2)


def import_everything() -> None:
    """What the children inherit."""
    load_script("training/train_pixelrepa.py")
    from diffusers.utils import logging
    from matplotlib.figure import Figure  # noqa: F401

    from pixelrepa_diffusers import hub  # noqa: F401

    logging.disable_progress_bar()


def matrix(folder: Path, trials: int, seed: int) -> dict:
    """Runs them all and returns the counts and how the disturbed runs ended."""
    folder.mkdir(parents=True)
    draw = random.Random(seed)
    with StandInHub() as hub:
        os.environ.update(hub.environment(folder / "home"))  # before anything imports the client
        import_everything()
        activities: list[Activity] = [kind(folder) for kind in (Training, Conversion, Evaluation, Generation)]
        activities.append(Publishing(folder, hub))
        deadly = trials // 40
        if deadly:
            activities.append(TrainingOfTwo(folder))
        for activity in activities:
            activity.measure()
        pairs = [(activity, fault) for fault in FAULTS if fault != "dead rank" for activity in activities[:5]]
        draw.shuffle(pairs)
        todo = [pairs[i % len(pairs)] for i in range(trials - deadly)] + [(activities[-1], "dead rank")] * deadly
        counts, endings, late = Counter(), {}, 0
        for number, (activity, fault) in enumerate(todo):
            while (ending := trial(activity, fault, number + 1000 * late, draw)) is None:
                late += 1
            print(f"{number + 1} of {trials}: {activity.name} × {fault}: {ending}", file=sys.stderr)
            counts[activity.name, fault] += 1
            endings.setdefault(f"{activity.name} × {fault}", Counter())[ending[:160]] += 1
        check_processes()
    return {
        "trials": sum(counts.values()),
        "table": {each.name: {fault: counts[each.name, fault] for fault in FAULTS} for each in activities},
        "too late, repeated": late,
        "seconds undisturbed": {activity.name: round(activity.seconds, 2) for activity in activities},
        "endings": endings,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="New; receives everything.")
    parser.add_argument("--trials", type=int, default=125)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    started = time.perf_counter()
    report = matrix(args.folder.resolve(), args.trials, args.seed)
    faults = list(next(iter(report["table"].values())))
    print("| trials | " + " | ".join(faults) + " |\n" + "|---" * (1 + len(faults)) + "|")
    for name, row in report["table"].items():
        print(f"| {name} | " + " | ".join(str(row[fault]) for fault in faults) + " |")
    print(
        f"{report['trials']} trials, {report['trials']} restarts finished, {report['trials']} results equal to the "
        f"undisturbed run, nothing damaged ({report['too late, repeated']} faults came too late and were repeated), "
        f"{time.perf_counter() - started:.0f} s."
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
