"""llama.cpp by its own bench programs, for `bench/compare.py`.

Arguments: a GGUF file, the folder with ``llama-bench`` and ``llama-batched-bench``, the vocabulary
size (unused by it: the programs draw tokens themselves). Each measurement is a run of a program,
which maps the file anew; its own timing is taken, so loading does not count. Above `SHARED`
prompt tokens the sequences share one prompt (``-pps``): filling so much would take minutes a block.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from protocol import serve

SHARED = 16384


class Engine:
    """Two programs and a file."""

    keeps_prefixes = False

    def __init__(self, file: str, folder: str, threads: int) -> None:
        self._file, self._folder, self._threads = file, Path(folder), str(threads)
        made = self._json("llama-bench", "-p", "1", "-n", "0", "-r", "1", "-o", "json")
        self.version = f"build {made[0]['build_number']} ({made[0]['build_commit']})"

    def prefill(self, prompt: list[int]) -> float:
        """See `protocol.Engine`."""
        length = len(prompt)
        arguments = ["-p", str(length), "-n", "0", "-r", "1", "-o", "json"]
        made = self._json("llama-bench", *arguments, "-ub", "512", "-b", str(max(length, 512)))
        return length / float(made[0]["avg_ts"])

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """See `protocol.Engine`."""
        batch, context = len(prompts), len(prompts[0])
        if batch == 1:
            depth = ["-p", "0", "-n", str(steps), "-d", str(context), "-r", "1", "-o", "json"]
            return 1.0 / float(self._json("llama-bench", *depth)[0]["avg_ts"])
        sizes = ["-npp", str(context), "-ntg", str(steps), "-npl", str(batch)]
        room = ["-c", str(batch * (context + steps) + 256), "-b", "512", "-ub", "512"]
        if batch * context > SHARED:
            room += ["-pps", "-kvu"]
        text = self._run("llama-batched-bench", *sizes, *room, "--output-format", "jsonl")
        row = next(json.loads(line) for line in text.splitlines() if line.startswith("{"))
        return float(row["t_tg"]) / steps

    def _json(self, program: str, *arguments: str) -> Any:
        return json.loads(self._run(program, *arguments))

    def _run(self, program: str, *arguments: str) -> str:
        command = [str(self._folder / program), "-m", self._file, "-t", self._threads, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stderr.strip()[-300:]}")
        return done.stdout


def peak_rss_bytes(pid: int | None = None) -> int:
    """The programs have ended: the largest of them, whatever ``pid``."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def main() -> None:
    """Serve the comparison."""
    import protocol

    protocol.peak_rss_bytes = peak_rss_bytes
    file, folder, vocabulary = sys.argv[1:4]
    threads = len(os.sched_getaffinity(0))
    serve(lambda: Engine(file, folder, threads), int(vocabulary))


if __name__ == "__main__":
    main()
