"""The reward `math`: the answer equals the manifest's as mathematics, by the library math-verify.

What runs: math-verify parses LaTeX with a grammar (antlr4) into SymPy objects and compares them. Two of its paths pass
text to SymPy's `parse_expr`, which is Python's `eval`: its parser of plain expressions, which is not used here (plain
expressions are rewritten as LaTeX), and every number of the grammar. In the worker process a function that reads
decimal numbers only takes the place of `parse_expr`, and an audit hook refuses to compile text, to write files, to
start programs and to connect. Outside the worker process the reward refuses to run.

math-verify's own time limit is a signal, which only the main thread can receive; here the worker process is ended.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import sys
import unicodedata
from dataclasses import dataclass
from typing import Any

from keye.errors import KeyeError, missing_package
from keye.evaluation.choices import without_lead
from keye.evaluation.words import FRAMING, normalise
from rl.rewards.base import Judgement, register

LONGEST = 400
"""Longest expression that is parsed, in characters."""

_DELIMITED = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_SQRT = re.compile(r"(?<!\\)\bsqrt\s*\(([^()]{1,100})\)")
_GREEK = re.compile(r"(?<![\\A-Za-z])(pi|theta|alpha|beta|infty)(?![A-Za-z])")
_NAMED = re.compile(r"\\(?:begin|end|mathrm|operatorname)\{[a-z]{1,12}\}")
_EQUALS = re.compile(r"(?<![<>!:=])=(?!=)")
_NAME = re.compile(r"\\?[A-Za-z]{1,8}(?:_\{?\w{1,4}\}?)?'?(?:\s*\(\s*[A-Za-z]\s*\))?")
_EMPHASIS = re.compile(r"^(\*{1,2})(?=[^\s*])(.*[^\s*])\1$")
_SCIENTIFIC = re.compile(r"(?<![\w.])([0-9]{1,20}(?:\.[0-9]{1,20})?)[eE]([-+]?[0-9]{1,3})(?![\w.])")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_DECIMAL = re.compile(r"[-+]?(?:[0-9]{1,400}(?:\.[0-9]{0,400})?|\.[0-9]{1,400})(?:[eE][-+]?[0-9]{1,3})?")
_GENERATORS = ("/sympy/polys/monomials.py", "/dataclasses.py", "/collections/__init__.py")
"""Files that compile text of their own: SymPy's products of monomials, by their number of variables, and classes."""
_CONFINED: list[bool] = []  # not empty in a process that `Math.confine` has confined
_FORBIDDEN = (
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.remove", "os.rename", "os.rmdir",
    "os.mkdir", "os.link", "os.symlink", "os.chmod", "subprocess.Popen", "socket.connect", "socket.bind",
    "ctypes.dlopen", "shutil.rmtree",
)  # fmt: skip


def expression(text: str) -> str | None:
    """The only expression in an answer, as LaTeX without delimiters.

    The content of `\\boxed{…}`, of `$…$`, `\\(…\\)` or `\\[…\\]`, or an answer without delimiters. None when there is
    none, when several differ, or when words around it do more than introduce it.
    """
    text = " ".join(text.split())
    if not text or len(text) > 4 * LONGEST:
        return None
    boxed = _boxed(text)
    if boxed:
        found = boxed[0].strip() if len(set(boxed)) == 1 else ""
    elif spans := list(_DELIMITED.finditer(text)):
        around = normalise(_DELIMITED.sub(" ", text)).split()
        found = next(filter(None, spans[0].groups())) if len(spans) == 1 and FRAMING.issuperset(around) else ""
    else:
        found = _latex(without_lead(text).strip().removesuffix("."))
    found = found.strip()
    return found if found and "$" not in found and len(found) <= LONGEST else None


def _boxed(text: str) -> list[str]:
    """The contents of all `\\boxed{…}`, which may contain braces."""
    found, at = [], text.find("\\boxed{")
    while at >= 0:
        begin = end = at + len("\\boxed{")
        depth = 1
        while end < len(text) and depth:
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        found.append(text[begin : end - 1] if depth == 0 else "")
        at = text.find("\\boxed{", end)
    return found


def _latex(text: str) -> str:
    """A plain expression such as `2*sqrt(3)/x` as LaTeX; empty for a text with words."""
    text = _EMPHASIS.sub(r"\2", text)
    text = re.sub("[¼½¾⅓⅔⅕⅛]", lambda sign: "{}/{}".format(*unicodedata.normalize("NFKC", sign[0]).split("⁄")), text)
    text = _SCIENTIFIC.sub(r"\1 \\cdot 10^{\2}", re.sub(r"√\s*(\d{1,20})", r"\\sqrt{\1}", text))
    text = _GREEK.sub(r"\\\1 ", _SQRT.sub(r"\\sqrt{\1}", text.replace("**", "^")))
    text = re.sub(r"\^\(([^()]{1,50})\)", r"^{\1}", text).replace("*", r" \cdot ")
    text = re.sub(r"(?<![\w.])([0-9]{1,20})\s*/\s*([0-9]{1,20})(?![\w.])", r"\\frac{\1}{\2}", text)
    return "" if _WORD.search(_NAMED.sub("", text)) else text


@register("math")
@dataclass(frozen=True)
class Math:
    """1 when the answer's only expression equals the manifest's: `\\frac{1}{2}`, `0.5` and `1/2` are equal.

    Raises:
        KeyeError: math-verify is not installed.
        ValueError: when called, a manifest's answer that is no expression.
    """

    def __post_init__(self) -> None:
        for name in ("math_verify", "antlr4"):
            if importlib.util.find_spec(name) is None:
                missing = ModuleNotFoundError(name="math_verify")
                raise missing_package(missing) or KeyeError("math-verify is not installed")

    def __call__(self, judgement: Judgement) -> float:
        if not _CONFINED:
            raise RuntimeError("the reward math runs in a worker process only; call it through rewards_from")
        from math_verify import verify

        truth = _parsed(expression(judgement.prompt.answer))
        if not truth:
            raise ValueError(f"the manifest's answer {judgement.prompt.answer!r:.80} is no mathematical expression")
        sides = _sides(expression(judgement.raw_answer), expression(judgement.prompt.answer))
        # Without math-verify's own time limit: the worker process has one.
        found = [bool(side := _parsed(text)) and verify(truth, side, timeout_seconds=None) for text in sides]
        return float(bool(found) and all(found))

    def load(self) -> None:
        """Import the library and fill the caches of its parser, which the children of the process then share."""
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)
        logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
        import sympy.integrals.manualintegrate  # noqa: F401 - imported by SymPy when it is needed, which compiles text
        import sympy.parsing.sympy_parser
        import sympy.physics.units  # noqa: F401 - the same
        from math_verify import verify

        pairs = ((r"\frac{1}{2}", "0.5"), (r"x^2 + \sqrt{3}", "(x+1)^2"), (r"\{1, 2\}", "(1, 2)"), ("x = 3", "3"))
        for one, two in (*pairs, (r"\int_0^1 x dx", r"\sin(y)^2"), (r"\sum_{k=1}^{3} k", "1 < x < 5")):
            verify(_parsed(one), _parsed(two), timeout_seconds=None)
        sympy.parsing.sympy_parser.parse_expr = _number

    def confine(self) -> None:
        """Refuse, from now on and in this process, what no comparison needs."""
        sys.addaudithook(_refuse)
        _CONFINED.append(True)


def _sides(reply: str | None, truth: str | None) -> list[str]:
    """The expressions that must all equal the truth: the sides of an equation, except a name such as `x` or `f(x)`.

    math-verify compares the last side alone, so that `3 = 5` would equal 5, and `5 = x` would not. A truth that is an
    equation is compared as a whole.
    """
    if reply is None:
        return []
    parts = _parts(reply)
    if len(parts) == 1 or truth is None or len(_parts(truth)) > 1:
        return [reply]
    values = [part for part in parts if not _NAME.fullmatch(part)]
    return values if len(parts) - len(values) <= 1 and values else [reply]


def _parts(latex: str) -> list[str]:
    """An expression divided at the equality signs that are in no braces, unlike that of `\\sum_{k=1}`."""
    parts, begin = [], 0
    for found in _EQUALS.finditer(latex):
        if latex.count("{", 0, found.start()) == latex.count("}", 0, found.start()):
            parts.append(latex[begin : found.start()].strip())
            begin = found.end()
    return [*parts, latex[begin:].strip()]


def _number(text: str, *_: Any, **__: Any) -> Any:
    """What takes the place of SymPy's `parse_expr`: a decimal number as SymPy reads it, without `eval`."""
    from sympy import Float, Integer

    if not isinstance(text, str) or not _DECIMAL.fullmatch(text):
        raise SyntaxError(f"{text!r:.40} is no decimal number")
    return Float(text) if "." in text or "e" in text.lower() else Integer(int(text))


def _parsed(latex: str | None) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    if latex is None:
        return []
    config = [LatexExtractionConfig(boxed_match_priority=-1)]
    return parse(f"${latex}$", config, fallback_mode="no_fallback", parsing_timeout=None)


def _refuse(event: str, details: tuple[Any, ...]) -> None:
    """An audit hook (PEP 578) that raises for compiled text, written files, programs and connections."""
    refused = event in _FORBIDDEN
    if event in ("compile", "exec"):
        name = str(details[1] or "") if event == "compile" else getattr(details[0], "co_filename", "<")
        caller = sys._getframe(1).f_code.co_filename.replace(os.sep, "/")
        refused = name.startswith("<") and not name.startswith("<frozen") and not caller.endswith(_GENERATORS)
    elif event == "open":
        _, mode, flags = details
        writes = any(sign in mode for sign in "wax+") if isinstance(mode, str) else False
        refused = writes or bool(flags and flags & (os.O_WRONLY | os.O_RDWR))
    if refused:
        raise PermissionError(f"{event} is refused in the process of the reward math")
