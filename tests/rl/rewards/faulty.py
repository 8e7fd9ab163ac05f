"""Rewards with faults, in a module that the worker process imports."""

import os
import socket
import subprocess
import time
from dataclasses import dataclass

from rl.rewards import Judgement, Math, register


@register("faulty")
@dataclass(frozen=True)
class Faulty:
    """Does what the text says."""

    good: float = 1.0

    def __call__(self, judgement: Judgement) -> float:
        if judgement.text == "raise":
            raise LookupError("no such rule")
        if judgement.text == "exit":
            raise SystemExit(3)
        if judgement.text == "crash":
            os.kill(os.getpid(), 11)
        if judgement.text == "hang":
            time.sleep(60)
        if judgement.text == "hang in C":  # holds the interpreter: no thread and no signal handler ends it
            return float(len(str(10**10**9)))
        if judgement.text == "memory":
            return float(len(bytearray(1 << 36)))
        print("a line on the standard output")
        return {"nan": float("nan"), "inf": float("inf"), "none": None, "text": "right"}.get(judgement.text, self.good)


@register("faulty_here")
class FaultyHere(Faulty):
    """The same in the training process."""

    in_process = True


@register("escape")
class Escape(Math):
    """Tries in the process of the reward `math` what the text names."""

    def __call__(self, judgement: Judgement) -> float:
        import sympy

        tries = {
            "eval": lambda: eval("1 + 1"),
            "exec": lambda: exec("a = 1"),
            "sympify": lambda: sympy.sympify("x + 1"),
            "write": lambda: open("written.txt", "w"),
            "os.open": lambda: os.open("written.txt", os.O_CREAT | os.O_WRONLY),
            "system": lambda: os.system("true"),
            "popen": lambda: subprocess.Popen(["true"]),
            "fork": os.fork,
            "remove": lambda: os.remove(__file__),
            "connect": lambda: socket.create_connection(("127.0.0.1", 9)),
            "number": lambda: sympy.Number("12.5"),
        }
        tries[judgement.text]()
        return 1.0
