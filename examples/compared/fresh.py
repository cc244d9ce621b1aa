"""Processes that start, load a model and write one token: their time, and the memory they share.

Knows no library.
"""

import time
from pathlib import Path

from .processes import Worker, WorkerEnded, foreign_share

# What a Linux kernel from 2017 on tells of the memory of a process.
ROLLUP = "/proc/{}/smaps_rollup"


def first_tokens(programs, folder, threads, rounds, cores):
    """Start each program in turn, `rounds` times, and let it do one unit of its task.

    Returns a dict: `rounds`, one {label: {"process", "seconds", "peak_bytes"}} each: seconds from
    the start of the process to the token, of them those after the imports, and bytes at the peak;
    `foreign`, one share each; `tokens` {label: its ids} and `failed` {label: why}.
    """
    times = []
    foreign = []
    tokens = {}
    failed = {}
    for k in range(rounds):
        answers = {}
        first = k % len(programs)
        for program in programs[first:] + programs[:first]:
            try:
                answers[program.label] = _one_token(program, folder, threads)
            except WorkerEnded as error:
                failed[program.label] = str(error)
        for label, answer in answers.items():
            tokens[label] = answer["results"][0]
            # They have one base and one prompt, so they must say the same.
            expected = tokens.get(programs[0].label)
            if expected not in (None, tokens[label]):
                failed[label] = f"its first token is {tokens[label]}, not {expected}"
        times.append({label: _row(answer) for label, answer in answers.items()})
        foreign.append(foreign_share(answers.values(), cores) if answers else None)
    return {"rounds": times, "foreign": foreign, "tokens": tokens, "failed": failed}


def _one_token(program, folder, threads):
    """The answer of a new process, with `process`, the seconds from its start to its token."""
    began = time.perf_counter()
    worker = Worker(program, folder, threads)
    try:
        worker.answer()
        answer = worker.call(0, 1)
        answer["process"] = time.perf_counter() - began
        return answer
    finally:
        worker.stop()


def _row(answer):
    return {
        "process": answer["process"],
        "seconds": answer["seconds"],
        "peak_bytes": answer["peak"],
    }


def memory_of_two(program, folder, threads):
    """{"one", "both"}: bytes of one process after its token, and of two together.

    They are proportional: a page that n processes map counts 1/n in each. None where the system
    does not tell. Raises: WorkerEnded.
    """
    workers = []
    try:
        for _ in range(2):
            workers.append(Worker(program, folder, threads))
            workers[-1].answer()
            workers[-1].call(0, 1)
            sizes = [proportional_bytes(worker.process.pid) for worker in workers]
            if None in sizes:
                return None
            if len(workers) == 1:
                one = sizes[0]
        return {"one": one, "both": sum(sizes)}
    finally:
        for worker in workers:
            worker.stop()


def proportional_bytes(pid, rollup=ROLLUP):
    """The proportional set size of a process in bytes, or None where the system does not tell."""
    try:
        lines = Path(rollup.format(pid)).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "Pss":
            return 1024 * int(value.split()[0])
    return None
