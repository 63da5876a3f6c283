"""An exported folder becomes a repository of a hub: of Hugging Face's, or of any that speaks as it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.utils import HFValidationError, build_hf_headers, get_session, validate_repo_id

from quiltnet.errors import UserError
from quiltnet.release.card import CARD_NAME, join_cards, read_card, save_card
from quiltnet.release.card_use import replace_use
from quiltnet.release.hub_calls import HubCalls

# What a new repository of the hub stores as large files, of the endings that an export may have; and whatever is larger
# than the hub takes as text.
LARGE_ENDINGS = {".safetensors", ".onnx", ".bin", ".pt", ".pth", ".npy", ".npz", ".model", ".h5", ".zip", ".tar", ".gz"}
LARGE_BYTES = 10 * 2**20
NEVER_PUSHED = (".git", ".cache")
PULL_REQUEST = "refs/pr/"
MESSAGE = "quiltnet export"


@dataclass(frozen=True)
class PushedFile:
    """One file of the folder; ``large`` where the hub keeps it beside git (LFS)."""

    path: str
    size: int
    large: bool


@dataclass(frozen=True)
class PushResult:
    """What went, or with a dry run would go, and where.

    Attributes:
        url: of the commit; None for a dry run.
        revision: where it went, if not to main.
        pull_request: its address, where one was opened.
    """

    repository: str
    files: list[PushedFile]
    url: str | None = None
    revision: str | None = None
    pull_request: str | None = None

    def __str__(self) -> str:
        """A line a file, and the sum."""
        total = sum(file.size for file in self.files)
        lines = [f"  {file.size:>13,}  {'LFS' if file.large else '   '}  {file.path}" for file in self.files]
        if self.url is None:
            head = f"dry run: {len(self.files)} files, {total:,} bytes, would go to {self.repository}; nothing was sent"
            return "\n".join([head, *lines])
        head = f"{self.repository}: {len(self.files)} files, {total:,} bytes: {self.pull_request or self.url}"
        if self.revision is None:
            lines.append(f'  quiltnet.load("hub:{self.repository}")')
        return "\n".join([head, *lines])


def check_push(repository: str, *, revision: str | None = None, create_pr: bool = False, dry_run: bool = False) -> None:
    """Find out what can be known before a long export; nothing is sent.

    Raises:
        UserError: no name of a repository, options that contradict each other, nobody logged in, the client is offline.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository!r} is no name of a repository; give one such as org/name ({error})") from error
    if "/" not in repository:
        raise UserError(f"{repository!r} does not say whose repository it is; give one such as org/{repository}")
    if create_pr and revision is not None:
        raise UserError(
            f"--create-pr opens a pull request against the main branch; it cannot go with --revision {revision}; "
            "leave one of them out"
        )
    if dry_run:
        return
    if constants.is_offline_mode():
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or look with --dry-run")
    if get_token() is None:
        raise UserError(
            f"nobody is logged in to {_host()}; run `hf auth login` with a token that may write to {repository}, or "
            "set HF_TOKEN"
        )


def push_folder(
    folder: Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
) -> PushResult:
    """Send every file of ``folder`` to ``repository``, which is made where it does not exist.

    The card's owner's parts of the repository are kept, in the folder's README.md too, and its code loads from there.
    Files that the repository has already are not sent again, so that a push which broke off continues.

    Args:
        private: of a repository that is made; one that exists must be private already.
        revision: a branch, made from main where there is none, or an open pull request (``refs/pr/3``).
        create_pr: open a pull request instead of writing to main.
        dry_run: list what would go, and send nothing.

    Raises:
        UserError: what ``check_push`` says; refused by the hub; unreachable, or broken off after several attempts. The
            folder is complete in every case.
    """
    folder = Path(folder)
    check_push(repository, revision=revision, create_pr=create_pr, dry_run=dry_run)
    files = list_files(folder)
    if dry_run:
        return PushResult(repository, files)
    api, calls = HfApi(), HubCalls(repository, folder)
    _enter_repository(api, calls, repository, private)
    if revision is not None and not revision.startswith(PULL_REQUEST):
        calls.make(api.create_branch, repository, branch=revision, exist_ok=True)
    _join_cards(api, calls, folder, repository, revision)
    pull_request = None
    if create_pr:  # by itself, so that an upload that is tried again does not open another
        opened = calls.make_once(api.create_pull_request, repository, title=MESSAGE)
        revision, pull_request = opened.git_reference, opened.url
        calls.goes_on_with(f"--revision {revision} in place of --create-pr")
    with _transfer(by_xet=calls.make(_speaks_xet, repository)):
        commit = calls.make(
            api.upload_folder,
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            commit_message=MESSAGE,
            ignore_patterns=[f"{pattern}{name}/*" for name in NEVER_PUSHED for pattern in ("", "*/")],
        )
    return PushResult(repository, list_files(folder), commit.commit_url, revision, pull_request)


def list_files(folder: Path) -> list[PushedFile]:
    """What a push takes, by path.

    Raises:
        UserError: there is no such folder, it is empty, or one of its links leads out of it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; export the model first")
    inside = folder.resolve()
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(folder)))
    for path in paths:
        if not path.resolve().is_relative_to(inside):
            raise UserError(
                f"{path} is a link to a file outside {folder}, which is not pushed; put the file itself there"
            )
    if not paths:
        raise UserError(f"{folder} is empty; export the model first")
    return [
        PushedFile(path.relative_to(folder).as_posix(), size := path.stat().st_size, _is_large(path, size))
        for path in paths
    ]


def _is_hidden(path: Path) -> bool:
    return any(part in NEVER_PUSHED for part in path.parts)


def _is_large(path: Path, size: int) -> bool:
    return path.suffix in LARGE_ENDINGS or size > LARGE_BYTES


def _enter_repository(api: HfApi, calls: HubCalls, repository: str, private: bool) -> None:
    """Make it, or enter the one that exists, unless that shows what should be hidden."""
    calls.make(api.create_repo, repository, private=True if private else None, exist_ok=True)
    if private and not calls.make(api.repo_info, repository).private:
        raise UserError(
            f"{repository} exists and everybody can read it, but --private was given; nothing was sent. Make it "
            "private in its settings, or choose another name"
        )


def _join_cards(api: HfApi, calls: HubCalls, folder: Path, repository: str, revision: str | None) -> None:
    """The folder's card with what the owner wrote in the repository's, and code that loads from the repository."""
    path = folder / CARD_NAME
    if not path.is_file():
        return
    card = replace_use(path.read_text(encoding="utf-8"), folder, repository)
    if calls.make(api.file_exists, repository, CARD_NAME, revision=revision):
        with TemporaryDirectory() as fetched:
            there = calls.make(api.hf_hub_download, repository, CARD_NAME, revision=revision, local_dir=fetched)
            card = join_cards(card, read_card(Path(there), f"the {CARD_NAME} of {repository}"))
    save_card(card, folder)


@contextmanager
def _transfer(*, by_xet: bool) -> Iterator[None]:
    """Uploads by Xet or by LFS. The client itself takes Xet wherever it is installed, whatever the hub can do."""
    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = before or not by_xet
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


def _speaks_xet(repository: str) -> bool:
    address = f"{constants.ENDPOINT}/api/models/{repository}/xet-write-token/{constants.DEFAULT_REVISION}"
    return get_session().get(address, headers=build_hf_headers()).is_success


def _host() -> str:
    return constants.ENDPOINT.rpartition("@")[2].removeprefix("https://")
