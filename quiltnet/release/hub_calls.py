"""Calls to a hub that are tried again where that helps, and that fail in words a user can act on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import ParamSpec, TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from quiltnet.errors import UserError
from quiltnet.redaction import redact

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

ATTEMPTS = 4
LONGEST_WAIT_S = 300
# 409: somebody else changed the repository at that moment. The rest: too many requests, and a server's bad moments.
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
# Of httpx, or of whatever the installed client is built on: its answers and its broken connections have this one base.
_HTTP_ERROR: type[BaseException] = HfHubHTTPError.__bases__[0]


class HubCalls:
    """Calls on behalf of one push of ``folder`` to ``repository``."""

    def __init__(self, repository: str, folder: Path) -> None:
        self._repository, self._folder = repository, folder
        self._command = "the same command"

    def goes_on_with(self, options: str) -> None:
        """From here on, the same command has to be given with other options to continue."""
        self._command = f"the same command with {options}"

    def make(self, call: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """``call(*args, **kwargs)``, again after a while where the hub was busy, failed or broke off.

        Raises:
            UserError: refused, or not possible after all attempts; the message never holds the token.
        """
        return self._make(_may_pass, call, *args, **kwargs)

    def make_once(self, call: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """The same for a call that must not take effect twice: again only where the hub said that it did nothing."""
        return self._make(_was_put_off, call, *args, **kwargs)

    def _make(self, again: Callable[[BaseException], bool], call: Callable[..., Result], *args, **kwargs) -> Result:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call(*args, **kwargs)
            except (OSError, RuntimeError, ValueError, _HTTP_ERROR) as error:
                cause = _cause(error)
                if cause is None:
                    raise
                if attempt == ATTEMPTS or not again(cause):
                    raise UserError(self._explain(error, cause)) from error
                time.sleep(_wait_s(cause, attempt))
        raise AssertionError("the last attempt returns or raises")

    def _explain(self, error: BaseException, cause: BaseException) -> str:
        host, status = redact(constants.ENDPOINT), _status(cause)
        words = getattr(cause, "server_message", None)
        said = redact(f"{status}: {words}" if words else str(status))
        kept = f"The export in {self._folder} is complete."
        if status == 401:
            return (
                f"{host} does not accept the token ({said}); run `hf auth login`, or set HF_TOKEN, with one that may "
                f"write to {self._repository}. {kept}"
            )
        if status == 403:
            return (
                f"{host} does not let this token write to {self._repository} ({said}); make one with write permission "
                f"in the settings of {host}, and run `hf auth login` with it. {kept}"
            )
        if status == 404:
            return f"{host} has no {self._repository}, or not the revision that was named ({said}). {kept}"
        if isinstance(cause, JSONDecodeError):
            return f"{host} answers as no hub does, with something else than JSON; is HF_ENDPOINT right? {kept}"
        told = dict.fromkeys(" ".join(str(link).split()) or type(link).__name__ for link in (error, cause))
        return (
            f"the push to {self._repository} at {host} did not end ({redact('; '.join(told))[:400]}). {kept} To "
            f"continue, give {self._command}; what has arrived is not sent again"
        )


def _cause(error: BaseException) -> BaseException | None:
    """What went wrong between here and the hub, in the chain of ``error``; None for a mistake of this program's."""
    links = (_HTTP_ERROR, ConnectionError, JSONDecodeError)
    found = next((link for link in _chain(error) if isinstance(link, links)), None)
    return found or (error if isinstance(error, (OSError, RuntimeError)) else None)  # a file, or Xet


def _may_pass(cause: BaseException) -> bool:
    status = _status(cause)
    return status in _PASSING or (status is None and isinstance(cause, (_HTTP_ERROR, ConnectionError, RuntimeError)))


def _was_put_off(cause: BaseException) -> bool:
    return _status(cause) == 429


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(cause: BaseException) -> int | None:
    """The hub's answer; None where none came."""
    response = getattr(cause, "response", None)
    return None if response is None else response.status_code


def _wait_s(cause: BaseException, attempt: int) -> float:
    """As long as the hub asks for; else 1, 2, 4 seconds."""
    asked = getattr(getattr(cause, "response", None), "headers", {}).get("Retry-After", "")
    return min(int(asked) if asked.isdigit() else 2 ** (attempt - 1), LONGEST_WAIT_S)
