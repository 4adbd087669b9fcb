"""Our side of the conversation with a peer: a script in `benchmarks/peers`, run by another Python."""

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

PEERS = Path(__file__).resolve().parent / "peers"


class PeerError(RuntimeError):
    """The peer failed; the message is its traceback."""


class PeerProcess:
    """A peer that waits for commands between its turns, idle.

    Attributes:
      facts: its versions, threads and settings, JSON values.
      timers: names that `run` takes.
    """

    def __init__(self, python: str, script: str, settings: dict[str, Any]):
        """Starts it and waits until it is ready.

        Args:
          python: of the peer's environment.
          script: file name in `benchmarks/peers`.
          settings: JSON values.

        Raises:
          PeerError: it did not get ready.
        """
        read, write = os.pipe()  # its standard output is for what its libraries print
        self._process = subprocess.Popen(
            [python, str(PEERS / script), json.dumps(settings), str(write)],
            stdin=subprocess.PIPE,
            stdout=2,
            pass_fds=(write,),
            text=True,
        )
        os.close(write)
        self._answers = os.fdopen(read)
        ready = self._answer()
        self.facts: dict[str, Any] = ready["facts"]
        self.timers: list[str] = ready["timers"]

    def run(self, name: str, count: int = 1) -> dict[str, Any]:
        """Has one of the timers do its work.

        Args:
          name: of the timer.
          count: times.

        Returns:
          Its answer; `seconds` is among it.

        Raises:
          PeerError: it failed or is gone.
        """
        stdin = self._process.stdin
        if stdin is None:
            raise PeerError("the peer has no input")
        stdin.write(json.dumps({"run": name, "count": count}) + "\n")
        stdin.flush()
        return self._answer()

    def seconds(self, name: str, count: int = 1) -> float:
        """The seconds of `run`."""
        return self.run(name, count)["seconds"]

    def close(self) -> None:
        """Ends it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._answers.close()
        self._process.wait(timeout=60)

    def __enter__(self) -> "PeerProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise PeerError(f"the peer ended with status {self._process.wait()}; see its output")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer
