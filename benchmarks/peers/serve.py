"""The peers' side of the conversation: one line of JSON in, one line of JSON out.

A peer is a script that another Python runs, with packages that never enter ours. It prints its facts
once and then answers `{"run": NAME, "count": N}` with `{"seconds": S}`; it ends with its input.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

Timer = Callable[[int], Any]


def serve(make: Callable[[dict[str, Any]], tuple[dict[str, Any], Mapping[str, Timer]]]) -> None:
    """Answers until the input ends.

    Args:
      make: settings, JSON values, of the first argument -> facts, and timers by name; a timer does its
        work `count` times and returns seconds, or a dict of JSON values. The second argument is the file
        descriptor to answer on.
    """
    answers = os.fdopen(int(sys.argv[2]), "w")  # not stdout: libraries print

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        facts, timers = make(json.loads(sys.argv[1]))
    except Exception:  # noqa: BLE001 - it is told to the other side, which raises
        answer({"error": traceback.format_exc()})
        return
    answer({"facts": facts, "timers": list(timers)})
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            result = timers[asked["run"]](asked["count"])
        except Exception:  # noqa: BLE001 - likewise
            answer({"error": traceback.format_exc()})
            continue
        answer(result if isinstance(result, dict) else {"seconds": result})
