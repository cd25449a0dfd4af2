"""An image built and run without an engine: a root directory, mounts, chroot. Needs root, and a
mount namespace of its own (`unshare --mount`): only when that is gone may the files be removed.

What stands in for the base image is this machine: its /usr and its Python, read only, and a copy of
its /etc.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.containers.files import ROOT, Service, steps

# What a machine needs to reach a package index, as a builder would be told it.
OF_THE_BUILDER = re.compile(r"(?i)pip_.*|ssl_cert_.*|.*_proxy")


class Image:
    """The files of an image, and the settings that a container of it begins with."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.volumes = directory / "volumes"
        self.environment = {
            "PATH": f"{sys.base_prefix}/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        }
        self.user, self.workdir = "root", "/"

    def build(self) -> None:
        """Carry out the Dockerfile; what fails raises CalledProcessError."""
        self._lay_base()
        for word, rest in steps():
            print(f"containers: {word} {rest}", flush=True)
            match word:
                case "RUN":
                    settings = {k: v for k, v in os.environ.items() if OF_THE_BUILDER.fullmatch(k)}
                    subprocess.run(self._enter(["sh", "-c", rest], settings), check=True)
                case "COPY":
                    self._copy(*shlex.split(rest))
                case "WORKDIR":
                    self.workdir = rest
                    (self.root / rest[1:]).mkdir(parents=True)
                case "ENV":
                    for setting in shlex.split(rest):
                        name, _, value = setting.partition("=")
                        self.environment[name] = value.replace("$PATH", self.environment["PATH"])
                case "USER":
                    self.user = rest
                case "FROM":
                    continue
                case _:
                    raise ValueError(f"{word}: not known here")

    def command(self, service: Service, words: Sequence[str]) -> list[str]:
        """Make the command that runs words in a container of a service."""
        root = shlex.quote(str(self.root))
        lines = ["set -e", f"mount --rbind {root} {root}"]
        if service.is_read_only:
            lines.append(f"mount -o remount,bind,ro {root}")
        for path in service.tmpfs:
            lines.append(f"mount -t tmpfs -o mode=1777 none {root}{path}")
        for source, target, is_read_only in service.volumes:
            held = shlex.quote(str(self._volume(source, target)))
            lines.append(f"mount --bind {held} {root}{target}")
            if is_read_only:
                lines.append(f"mount -o remount,bind,ro {root}{target}")
        lines.append(f"exec {shlex.join(self._enter(words, service.environment))}")
        return ["unshare", "--mount", "sh", "-c", "\n".join(lines)]

    def make_mount_points(self, services: Sequence[Service]) -> None:
        """Make the directories that an engine makes where something is mounted."""
        for service in services:
            for target in [*(target for _, target, _ in service.volumes), *service.tmpfs]:
                (self.root / target[1:]).mkdir(parents=True, exist_ok=True)

    def _volume(self, source: str, target: str) -> Path:
        """Find what is mounted; a named volume begins with what the image has there."""
        if source.startswith("/"):
            return Path(source)
        held = self.volumes / source
        if not held.exists():
            self.volumes.mkdir(exist_ok=True)
            subprocess.run(["cp", "-a", self.root / target[1:], held], check=True)
        return held

    def _enter(self, words: Sequence[str], environment: dict[str, str]) -> list[str]:
        home = "/root" if self.user == "root" else f"/home/{self.user}"
        settings = {"HOME": home} | self.environment | environment
        as_user = (
            []
            if self.user == "root"
            else [
                *("setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--init-groups"),
                *("--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"),
            ]
        )
        return [
            *("env", "-i", *(f"{name}={value}" for name, value in settings.items())),
            *("chroot", str(self.root), *as_user, "env", "-C", self.workdir, *words),
        ]

    def _copy(self, *paths: str) -> None:
        """Copy what git tracks, as a builder does with a clean clone."""
        *sources, target = paths
        goal = self.root / self.workdir[1:] / target
        for source in sources:
            listed = subprocess.run(
                ["git", "ls-files", "-z", "--", source], cwd=ROOT, check=True, capture_output=True
            ).stdout.decode()
            if not listed:
                raise ValueError(f"COPY {source}: git tracks no such file")
            for name in listed.rstrip("\0").split("\0"):
                within = Path(name).relative_to(source) if name != source else Path(name)
                (goal / within).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, goal / within)

    def _lay_base(self) -> None:
        for name in ("tmp", "root", "home", "var/lib", "proc", "dev/shm"):
            (self.root / name).mkdir(parents=True)
        for name in ("tmp", "dev/shm"):
            (self.root / name).chmod(0o1777)
        for name in ("bin", "sbin", "lib", "lib64"):
            (self.root / name).symlink_to(f"usr/{name}")
        shutil.copytree("/etc", self.root / "etc", symlinks=True)
        subprocess.run(["mount", "-t", "proc", "proc", self.root / "proc"], check=True)
        for name in ("null", "zero", "random", "urandom"):
            (self.root / "dev" / name).touch()
            subprocess.run(
                ["mount", "--bind", f"/dev/{name}", self.root / "dev" / name], check=True
            )
        for source in ("/usr", sys.base_prefix):
            target = self.root / source[1:]
            if not target.exists():
                target.mkdir(parents=True)
                subprocess.run(["mount", "--bind", source, target], check=True)
                subprocess.run(["mount", "-o", "remount,bind,ro", target], check=True)
