"""Orderly stops of a training script on SIGTERM, SIGUSR1 and Ctrl-C."""

from __future__ import annotations

import signal

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object


logger = get_logger(__name__)


class StopRequest:
    """Context in which SIGTERM, SIGUSR1 and Ctrl-C request an orderly stop; a second Ctrl-C interrupts at once."""

    signal: signal.Signals | None = None

    def __enter__(self) -> StopRequest:
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self.handlers = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def agreed(self, accelerator: Accelerator, now: bool) -> bool:
        """Return whether to stop. Several processes stop at the same step: they compare only when `now` is true on all."""
        if accelerator.num_processes > 1:
            if not now:
                return False
            self.signal = next((received for received in gather_object([self.signal]) if received), None)
        return self.signal is not None

    def exit_if_early(self, step: int, max_train_steps: int) -> None:
        """Exit with 128 + the signal if it stopped the run before its last step."""
        if step < max_train_steps:
            logger.warning(
                f"Stopped by {self.signal.name} at step {step} of {max_train_steps}. Continue with "
                "--resume_from_checkpoint latest."
            )
            raise SystemExit(128 + self.signal)
