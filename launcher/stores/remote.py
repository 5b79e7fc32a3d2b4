"""Folders of a machine behind ssh, by GNU coreutils and findutils there. A call is one script over one connection."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from launcher.contract import SEGMENTS
from launcher.errors import CvlaunchError, IntegrityError, SpecError, UnsupportedError
from launcher.remote import Done, Host
from launcher.stores.base import Entry
from launcher.stores.file_errors import file_error
from launcher.stores.folders import PROBE, copy_into_place
from launcher.stores.paths import bad_path, check_path, from_store

__all__ = ["RemoteStore"]

_LEFT, _SHORT = 90, 91
"""Exit codes of ours: a symbolic link leads out of the folder; not all bytes came through."""

# C: error texts in English, as _ERRORS knows them. below ROOT PATH: ends the script if PATH, with its links followed,
# stands elsewhere.
_BEGIN = r"""
export LC_ALL=C
below() {
    root=$(realpath -m -- "$1") && path=$(realpath -m -- "$2") || exit
    case $path/ in "${root%/}"/*) ;; *) exit 90 ;; esac
}
full=$1/$2 folder=$1/${2%/*}
[ "${2%/*}" != "$2" ] || folder=$1
"""

_HEAD = r"""
below "$1" "$full"
exec find -L "$full" -maxdepth 0 -type f -printf '%s %T@ %i \0'
"""

_LIST = r"""
below "$1" "$full"
exec find "$full/" -ignore_readdir_race -type f ! -name '.*.part' -printf '%s %T@ %i %P\0'
"""

_OPEN = r"""
below "$1" "$full"
[ -d "$full" ] && exec cat -- "$full"  # its error
exec < "$full" || exit
"""

_READ = r"""
tail -c "+$3" | if [ "$4" ]; then exec head -c "$4"; else exec cat; fi
"""

_DOWNLOAD = r"""
facts=$(stat -L -c '%s %.9Y %i' -) || exit
echo "$facts" >&2
exec head -c "${facts%% *}"
"""

_WRITE = r"""
below "$1" "$folder"
mkdir -p -- "$folder" || exit
part=$folder/$3
trap 'rm -f -- "$part"' EXIT
head -c "$4" > "$part" || exit
[ "$(stat -c %s -- "$part")" = "$4" ] || exit 91
"""

_REPLACE = r"""
mv -f -T -- "$part" "$full"
"""

# where hard links are unknown, O_EXCL does
_ADD = r"""
said=$(ln -T -- "$part" "$full" 2>&1) && exit
case $said in *": File exists") echo "$said" >&2; exit 1 ;; esac
set -C
exec 3> "$full" || exit
cat -- "$part" >&3 || { rm -f -- "$full"; exit 1; }
"""

_DELETE = r"""
set -o pipefail
while IFS= read -r -d '' path; do
    full=$1/$path
    if [ "${full%/*}" != "$seen" ]; then
        seen=${full%/*}
        below "$1" "$seen"
    fi
    printf '%s\0' "$full"
done | xargs -0 -r rm -f --
"""

_ERRORS: Sequence[tuple[str, str]] = (
    (": (Permission denied|Operation not permitted)$", "EACCES"),
    (": Read-only file system$", "EROFS"),
    (": No space left on device$", "ENOSPC"),
    (": Disk quota exceeded$", "EDQUOT"),
    (": Not a directory$|^mv: cannot overwrite directory ", "ENOTDIR"),
    (": Is a directory$", "EISDIR"),
    (": (File name too long|Too many levels of symbolic links)$", "ENAMETOOLONG"),
    (": (Stale file handle|Input/output error|Transport endpoint is not connected)$", "ESTALE"),
)
"""What a tool said → the errno behind it. The error ends the line, after a name that may be anything."""


@dataclass(frozen=True)
class RemoteStore:
    """The folder `root` of a machine behind ssh, which need not exist before something is written.

    Symbolic links are not listed; a path that leads out of the folder through one is refused.
    root: an absolute path. in_place: of a run whose runner writes there itself, so that no file stands in segments and
    a follower need not ask for any.
    """

    host: Host
    root: str
    in_place: bool = False

    def __post_init__(self) -> None:
        inside = self.root.strip("/")
        if not self.root.startswith("/") or not inside or bad_path(inside):
            raise SpecError(f"{self.root!r} is not a folder on {self.host.name}; one looks like /scratch/me/runs")

    @property
    def uri(self) -> str:
        return f"ssh://{self.host.name}/{self.root.strip('/')}"

    def head(self, path: str) -> Entry | None:
        done = self._run(_HEAD, check_path(path))
        if done.code and not _is_missing(done.err):
            raise self._error(done, path)
        return next((_entry(path, facts) for facts, _ in _records(done.out)), None)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        if self.in_place and prefix == SEGMENTS:
            return
        done = self._run(_LIST, check_path(prefix) if prefix else "")
        if done.code and not _is_missing(done.err):
            raise self._error(done, prefix)
        start = f"{prefix}/" if prefix else ""
        found = {start + path: facts for facts, path in _records(done.out)}
        yield from (_entry(from_store(path, self.uri), found[path]) for path in sorted(found))

    def read(self, path: str) -> bytes:
        return self.read_range(path, 0)

    def read_range(self, path: str, start: int, end: int | None = None) -> bytes:
        if self.in_place and path.startswith(f"{SEGMENTS}/"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.uri}/{path}")
        length = "" if end is None else str(max(0, end - start))
        return self._checked(self._run(_OPEN + _READ, check_path(path), str(start + 1), length), path).out

    def write(self, path: str, data: bytes | Path, *, if_absent: bool = False) -> None:
        part = f".{check_path(path).rpartition('/')[2][:200]}.{secrets.token_hex(8)}.part"
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        script = _WRITE + (_ADD if if_absent else _REPLACE)
        self._checked(self._run(script, path, part, str(size), stdin=data), path)

    def download(self, path: str, to: Path) -> Entry:
        check_path(path)
        with copy_into_place(to) as file:
            done = self._checked(self._run(_OPEN + _DOWNLOAD, path, to=file), path)
            entry = _entry(path, done.err.split()[-3:])
            if file.tell() != entry.size:
                raise self._cut_short(path)
            return entry

    def delete(self, paths: Iterable[str]) -> None:
        names = "".join(f"{check_path(path)}\0" for path in paths)
        if names:
            self._checked(self._run(_DELETE, "", stdin=names.encode()), "")

    def local_path(self, path: str = "") -> Path | None:
        return None

    def check_writable(self) -> None:
        self.write(PROBE, b"")
        self.delete([PROBE])

    def _run(self, script: str, *arguments: str, stdin: bytes | Path = b"", to: BinaryIO | None = None) -> Done:
        return self.host.run(_BEGIN + script, self.root, *arguments, stdin=stdin, to=to, login=False)

    def _checked(self, done: Done, path: str) -> Done:
        if done.code:
            raise self._error(done, path)
        return done

    def _error(self, done: Done, path: str) -> Exception:
        place = f"{self.uri}/{path}".rstrip("/")
        if done.code == _LEFT:
            return SpecError(f"{path!r} leaves {self.uri} through a symbolic link: remove the link")
        if done.code == _SHORT:
            return self._cut_short(path)
        if re.search(": (File exists|cannot overwrite existing file)$", done.err, re.MULTILINE):
            return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), place)
        for pattern, name in _ERRORS:
            if re.search(pattern, done.err, re.MULTILINE):
                return file_error(name, place)
        if re.search(": command not found$", done.err, re.MULTILINE):
            return UnsupportedError(f"{place}: GNU coreutils and findutils are needed there: ask its administrators")
        if _is_missing(done.err):
            return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place)
        return CvlaunchError(f"{place}: exit code {done.code}: {done.err.strip()[-300:] or 'nothing was said'}")

    def _cut_short(self, path: str) -> IntegrityError:
        return IntegrityError(f"{path!r} in {self.uri} was cut short while it was copied: copy it again")


def _is_missing(err: str) -> bool:
    """Whether nothing but that is wrong: files may vanish while others are listed."""
    lines = [line for line in err.splitlines() if line.strip()]
    return bool(lines) and all(re.search(": (No such file or directory|Not a directory)$", line) for line in lines)


def _records(out: bytes) -> Iterator[tuple[Sequence[str], str]]:
    """(size, modified, inode), path."""
    for record in out.decode("utf-8", "surrogateescape").split("\0")[:-1]:
        size, modified, inode, path = record.split(" ", 3)
        yield (size, modified, inode), path


def _entry(path: str, facts: Sequence[str]) -> Entry:
    """The same that FolderStore has for this file."""
    size, modified, inode = facts
    seconds, _, fraction = modified.partition(".")
    nanoseconds = int(fraction[:9].ljust(9, "0"))
    etag = f"{int(seconds) * 10**9 + nanoseconds:x}-{int(size):x}-{int(inode):x}"
    return Entry(path, int(size), int(seconds) + 1e-9 * nanoseconds, etag)  # rounded as st_mtime is
