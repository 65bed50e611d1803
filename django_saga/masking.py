"""What looks like a secret, taken out of texts before they are stored, logged or shown.

Pure functions. What comes in is hostile, a service's answer for example, so each text is read once:
a pattern starts at the beginning of a word only, and gives back nothing that it has taken.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from decimal import Decimal
from functools import lru_cache
from typing import Any
from urllib.parse import quote, quote_plus

import msgspec

MASK = "********"
LONGEST = 100  # characters of a key that is remembered
SHORTEST = 4  # characters of a known value that is looked for; shorter ones are in every text


def mask_text(text: str, secrets: Iterable[str] = ()) -> str:
    """The text with a mask for each of the ``secrets``, and for all that looks like one."""
    text = mask_known(text, secrets)
    text = _PRIVATE_KEY.sub(MASK, text)
    text = _URL_PASSWORD.sub(rf"\1{MASK}\2", text)
    text = _ELEMENT.sub(_mask_element, text)
    text = _mask_pairs(text)
    text = _SCHEME.sub(_mask_scheme, text)
    text = _TOKEN.sub(MASK, text)
    return _CARD.sub(_mask_card, text)


def mask_json(stored: str, sensitive: Collection[str] = ()) -> str:
    """JSON with the same shape, and masks for values of ``sensitive`` keys and of all that look so.

    What is no JSON is masked as a text.
    """
    if not sensitive and not _is_suspect(stored):
        return stored  # as most contexts are, of which a bit is written after each step
    try:
        value = _DECODER.decode(stored)
        secrets = set(_values(value, sensitive))
        return _ENCODER.encode(_masked(value, sensitive, secrets)).decode()
    except _NO_JSON:
        return mask_text(stored)


def sensitive_values(stored: str, sensitive: Collection[str] = ()) -> set[str]:
    """The values of keys that are ``sensitive``, or look secret, in a context's JSON, as texts."""
    try:
        return set(_values(_DECODER.decode(stored), sensitive))
    except _NO_JSON:
        return set()


def looks_secret(key: str) -> bool:
    """Whether a key by this name holds a secret: ``password``, ``X-Api-Key``, ``cardNumber``."""
    return (_looks_secret if len(key) <= LONGEST else _looks_secret.__wrapped__)(key)


@lru_cache(maxsize=4096)  # the same names come again in every traceback
def _looks_secret(key: str) -> bool:
    name = re.split(r"[.:]", key)[-1]  # the attribute of a dotted name, the tag after a namespace
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or _SAYS_THAT.fullmatch(words[0]) or _SAYS_WHAT.fullmatch(words[-1]):
        return False
    return any(map(_SECRET_WORD.fullmatch, words)) or bool(_SECRET_PARTS.search("".join(words)))


# What is said of a secret rather than the secret itself, in names of exceptions too.
_SAYS_THAT = re.compile("bad|expired|has|invalid|is|max|min|missing|no|num|total|unknown|wrong")
_SAYS_WHAT = re.compile(
    "at|count|enabled|errors?|expire[ds]|expiry|length|limit|method|name|path|required|size|status|"
    "type|url|user|valid|version"
)
_SECRET_WORD = re.compile(
    "auth|bearer|cvc|cvv2?|csc|dsn|hmac|iban|jwt|otp|pan|pass|pin|pwd|sid|sig|session|ssn|tan|totp"
)
_SECRET_PARTS = re.compile(
    "password|passwd|passphrase|passcode|secret|token|credential|authorization|cookie|csrf|xsrf|"
    "signature|sessionid|sessionkey|sessid|connectionstring|securitycode|verificationcode|"
    "socialsecurity|accountnumber|routingnumber|cardnumber|cardno|onetimecode|mysqlpwd|"
    "(?:api|access|account|auth|encryption|master|private|service|shared|signing|ssh|storage)keys?"
)
_WORD = re.compile(r"[A-Z]{2,}(?![a-z])|[A-Z]?[a-z0-9]+|[A-Z0-9]+|[^\W\d_]+")


# Values that are known


def mask_known(text: str, secrets: Iterable[str]) -> str:
    """The text with a mask for each of the ``secrets``, in whatever form it is there."""
    known = {form for secret in secrets if _telling(secret) for form in _forms(secret)}
    for form in sorted(filter(_telling, known), key=len, reverse=True):  # one may hold another
        if form.isdecimal():  # a PIN is not to be found in every longer number
            text = re.sub(rf"(?<![0-9]){form}(?![0-9])", MASK, text)
        else:
            text = text.replace(form, MASK)
    return text


def _telling(value: str) -> bool:
    return len(value) >= SHORTEST and value not in _TELLING_NOTHING and bool(value.strip("*"))


def _forms(secret: str) -> Iterator[str]:
    """A value as it is, and as it looks in a repr, in JSON, in a URL; bytes are base64 in JSON."""
    yield secret
    yield repr(secret)[1:-1]
    yield json.dumps(secret)[1:-1]
    yield json.dumps(secret, ensure_ascii=False)[1:-1]
    quotable = secret.encode("utf-8", "surrogatepass")
    yield from (quote(quotable), quote(quotable, safe=""), quote_plus(quotable))
    with suppress(ValueError):
        yield repr(b64decode(secret, validate=True))[2:-1]


# Keys and their values, in whatever notation

# A key, its closing quote if it has one, and what stands between it and its value.
_KEY = re.compile(
    r"""(?<![A-Za-z0-9_.$%\[-])(?P<key>[A-Za-z0-9_.$%\[-]++)"""
    r"""(?: (?P<pair>\\{0,7}["'][ ]?,[ ]?)(?=b?\\{0,7}["'])"""
    r"""  | \\{0,7}["']?(?:\]|%5[Dd])?[ \t]{0,3}(?!::)(?:!=|[:=]{1,3}>?|->)[ \t]{0,3}"""
    r"""  | [ ](?=\\{0,7}["'][^\s"']{6}) | (?<=[a-z])(?P<blank>[ ])(?=[^\s-])"""
    r""")""",
    re.VERBOSE,
)
_QUOTED = re.compile(
    r"""[bfru]{0,2}(?P<quote>\\{0,7}["'])(?P<body>(?:(?!(?P=quote))(?:\\.|[^\\\r\n]))*+)"""
)
_BARE = re.compile(
    r"(?:(?:bearer|basic|token|digest|apikey|negotiate)\s{1,3})?[^\s\"'&;]++", re.IGNORECASE
)
_REST_OF_LINE = re.compile(r"(?:[^\r\n\\]|\\(?![rn]))*+")
_OPENING = re.compile(r"[A-Za-z0-9_.]*+[\[({]")
_INSIDE = re.compile(r"""[\[({]|[\])}]|"(?:[^"\\\r\n]|\\.)*+"|'(?:[^'\\\r\n]|\\.)*+'|\n""")
_LINE = re.compile(r"\n(?P<indent>[ \t]*+)(?:(?P<closes>[\])}]++)|[^\n]*+)")
_TELLING_NOTHING = frozenset(["", "None", "null", "nil", "True", "False", "true", "false", MASK])
_MASKED = re.compile(rf"{re.escape(MASK)}[,.:)\]}}>]*+(?:\\[nrt]|\Z)")


def _mask_pairs(text: str) -> str:
    parts: list[str] = []
    at = 0
    for match in _KEY.finditer(text):
        if match.start() < at or not _is_secret_key(text, match):
            continue
        if _MASKED.match(text, match.end()):  # the line of a repr goes on after it
            continue
        begin, end = _value_at(text, match.end(), match["key"])
        if text[begin:end] not in _TELLING_NOTHING:
            parts += text[at:begin], MASK
            at = end
    return "".join(parts) + text[at:]


def _is_secret_key(text: str, match: re.Match[str]) -> bool:
    key = match["key"].replace("%5B", "[").replace("%5b", "[").rpartition("[")[2]
    before = text[max(0, match.start() - 10) : match.start()]
    if match["pair"] and not re.search(r"\(b?\\{0,7}[\"']\Z", before):
        return False  # two of a list of names rather than a name with its value
    if match["blank"] and not key.startswith("--"):
        return False  # two words of a sentence rather than an option with its value
    escaped = before.endswith("\\") and key[:1] in ("n", "r", "t")  # a newline in a repr
    return looks_secret(key) or (escaped and looks_secret(key[1:]))


def _value_at(text: str, at: int, key: str) -> tuple[int, int]:
    """Where a value begins and ends, without its quotes."""
    if quoted := _QUOTED.match(text, at):
        return quoted.span("body")
    if opening := _OPENING.match(text, at):
        return at, _closing(text, opening)
    if "cookie" in key.lower() and (rest := _REST_OF_LINE.match(text, at)):
        return at, rest.end()
    bare = _BARE.match(text, at)
    return (at, at + len(bare[0].rstrip(",.:)]}>"))) if bare else (at, at)


def _closing(text: str, opening: re.Match[str]) -> int:
    """The end of what a bracket opens; at most that of its line and of the deeper ones below."""
    depth, end = 1, len(text)
    for match in _INSIDE.finditer(text, opening.end()):
        if match[0] == "\n":
            end = match.start()
            break
        depth += (match[0] in "[({") - (match[0] in "])}")
        if not depth:
            return match.end()
    above = text[text.rfind("\n", 0, opening.start()) + 1 : opening.start()]
    indent = len(above) - len(above.lstrip(" \t"))
    while (line := _LINE.match(text, end)) and len(line["indent"]) > indent:
        end = line.end()
    return line.end() if line and line["closes"] else end


# <password>...</password>
_ELEMENT = re.compile(
    r"(<(?P<tag>[A-Za-z_][\w:.-]*+)(?:\s[^<>]*+)?>(?:<!\[CDATA\[)?)(?P<value>[^<>]++)(?=</|>)"
)


def _mask_element(match: re.Match[str]) -> str:
    return match[1] + MASK if looks_secret(match["tag"]) else match[0]


# Values that give themselves away

_START = r"(?:(?<![A-Za-z0-9_-])|(?<=\\[nrt]))"
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:(?:[^-]|-(?!----))*+-----END [A-Z0-9 ]{0,50}-----|(?:[A-Za-z0-9+/=\r\n]|\\[nr])*+)"
)
_URL_PASSWORD = re.compile(r"""(://[^\s:/@"'<>]*+:)[^\s/"'<>]+(@)""")
_SCHEME = re.compile(
    _START + r"(?P<scheme>(?:bearer|basic)\s{1,3})(?P<value>[\w.~+/=-]{8,}+)", re.I
)
_TOKEN = re.compile(
    _START + r"(?:"
    r"eyJ[\w-]{5,}+\.[\w-]{5,}+(?:\.[\w-]*+)*+"  # JWT, JWE
    r"|[spr]k_(?:live|test)_\w{8,}+|whsec_[\w+/=]{8,}+|rzp_(?:live|test)_\w{8,}+"  # payments
    r"|sq0[a-z]{3}-[\w-]{20,}+|EAAA[\w-]{40,}+"
    r"|gh[oprsu]_\w{16,}+|github_pat_\w{16,}+"  # code
    r"|gl(?:pat|ptt|dt|rt|cbt|soat|agent)-[\w-]{16,}+"
    r"|npm_\w{20,}+|pypi-[\w-]{20,}+|dckr_pat_[\w-]{16,}+|hf_\w{20,}+"
    r"|xox[a-z]-[\w-]{8,}+|xapp-[\w-]{8,}+|[0-9]{8,10}:AA[\w-]{30,}+"  # chat
    r"|A(?:KI|SI|RO|ID|GP)A[A-Z0-9]{12,}+|AIza[\w-]{30,}+|ya29\.[\w.-]{10,}+"  # clouds
    r"|GOCSPX-[\w-]{16,}+|do[op]_v1_\w{16,}+|hv[bs]\.[\w-]{16,}+|shp[a-z]{2}_\w{16,}+"
    r"|SG\.[\w-]{10,}+\.[\w-]{10,}+|key-[0-9a-f]{32}|(?:SK|AC)[0-9a-f]{32}"  # mail, phone
    r"|sk-(?=[\w-]*?[0-9])[\w-]{16,}+|AGE-SECRET-KEY-1\w{16,}+"
    r")"
    r"|(?<=hooks\.slack\.com/services/)[\w/]++"
)
_CARD = re.compile(
    r"(?:(?<![A-Za-z0-9])(?<![0-9*]\.)|(?<=\\[nrt]))(?:[2-6][0-9]{12,18}+|(?<![A-Za-z0-9*]-)"
    r"[2-6][0-9]{3}([ -])(?:[0-9]{4}\1[0-9]{4}\1[0-9]{1,4}|[0-9]{6}\1[0-9]{4,5}))(?![A-Za-z0-9])"
)


def _mask_scheme(match: re.Match[str]) -> str:
    value = match["value"]
    word = value.isalpha() and value[1:].islower() and len(value) < 20
    return match[0] if word else match["scheme"] + MASK  # "Basic authentication" is no secret


def _mask_card(match: re.Match[str]) -> str:
    digits = re.sub("[ -]", "", match[0])
    if digits[0] == "2" and not ("22" <= digits[:2] <= "27" and len(digits) >= 16):
        return match[0]  # a date and time without separators
    doubled = (int(digit) * 2 for digit in digits[-2::-2])
    luhn = sum(map(int, digits[-1::-2])) + sum(n - 9 if n > 9 else n for n in doubled)
    return match[0] if luhn % 10 else MASK


# Contexts


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


# Decimals are written as they were read.
_DECODER = json.JSONDecoder(parse_int=Decimal, parse_float=Decimal, parse_constant=_refuse)


def _masked(
    value: Any, sensitive: Collection[str], secrets: Collection[str], inside: bool = False
) -> Any:
    match value:
        case dict():
            return {
                mask_text(key, secrets): _masked(
                    inner, sensitive, secrets, inside or key in sensitive or looks_secret(key)
                )
                for key, inner in value.items()
            }
        case list():
            return [_masked(inner, sensitive, secrets, inside) for inner in value]
        case None | bool() | "":
            return value
        case Decimal() if not inside and str(value) not in secrets:
            return MASK if _CARD.sub(_mask_card, str(value)) == MASK else value
        case str() if not inside:
            return mask_text(value, secrets)
    return MASK


def _values(value: Any, sensitive: Collection[str], inside: bool = False) -> Iterator[str]:
    match value:
        case dict():
            for key, inner in value.items():
                hit = inside or key in sensitive or looks_secret(key)
                yield from _values(inner, sensitive, hit)
        case list():
            for inner in value:
                yield from _values(inner, sensitive, inside)
        case str() | Decimal() if inside:
            yield str(value)


def _is_suspect(text: str) -> bool:
    """Whether anything in it could be masked; much cheaper than to look."""
    lower = text.lower()
    return any(part in lower for part in _PARTS) or bool(_LONG.search(lower))


_PARTS = [
    "auth",
    "basic",
    "bearer",
    "card",
    "code",
    "cookie",
    "credential",
    "csc",
    "csrf",
    "cvc",
    "cvv",
    "dsn",
    "hmac",
    "iban",
    "jwt",
    "key",
    "number",
    "otp",
    "pan",
    "pass",
    "pin",
    "pwd",
    "secret",
    "sess",
    "sid",
    "sig",
    "social",
    "ssn",
    "string",
    "tan",
    "token",
    "totp",
    "xsrf",
    "://",
    "-----begin",
    "<",
    "\\",
    "eyj",
    "sk_",
    "sk-",
    "pk_",
    "rk_",
    "whsec_",
    "rzp_",
    "sq0",
    "eaaa",
    "gho_",
    "ghp_",
    "ghr_",
    "ghs_",
    "ghu_",
    "github_",
    "gl",
    "npm_",
    "pypi-",
    "dckr_",
    "hf_",
    "xox",
    "xapp-",
    ":aa",
    "akia",
    "asia",
    "aroa",
    "aida",
    "agpa",
    "aiza",
    "ya29",
    "gocspx-",
    "do_v1",
    "dop_v1",
    "doo_v1",
    "hvb.",
    "hvs.",
    "shp",
    "sg.",
    "slack.com",
]
_LONG = re.compile("[0-9](?:[ -]?[0-9]){12}|[0-9a-f]{32}")
_ENCODER = msgspec.json.Encoder(decimal_format="number")
_NO_JSON = (ValueError, ArithmeticError, RecursionError)
