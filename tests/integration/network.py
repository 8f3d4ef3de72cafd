"""Network namespaces of a test's own, joined by a bridge that it can cut: a node that is cut off, not dead.

One namespace a node (10.99.0.(10 + n)) and one for the controller, the hub (10.99.0.1), which has the bridge. Needs root
and the right to make namespaces: make() raises NotAllowed with the reason where that is not so. Whoever made one removes
it, after its processes have ended.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


class NotAllowed(Exception):
    """No namespaces here, and why."""


def sh(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


class Network:
    HUB_ADDRESS = "10.99.0.1"

    def __init__(self, nodes: int) -> None:
        self.tag = f"es{os.getpid() % 100000}"
        self.hub = f"{self.tag}c"
        self.names = [f"{self.tag}n{i}" for i in range(nodes)]

    def address(self, node: int) -> str:
        return f"10.99.0.{10 + node}"

    def make(self) -> None:
        try:
            self._make()
        except (AssertionError, OSError) as e:
            self.remove()
            raise NotAllowed(f"no network namespaces here: {str(e).strip()}") from None

    def _make(self) -> None:
        sh("ip", "netns", "add", self.hub)
        inside = ("ip", "netns", "exec", self.hub, "ip")
        sh(*inside, "link", "set", "lo", "up")
        sh(*inside, "link", "add", "br0", "type", "bridge")
        sh(*inside, "addr", "add", f"{self.HUB_ADDRESS}/24", "dev", "br0")
        sh(*inside, "link", "set", "br0", "up")
        for i, name in enumerate(self.names):
            sh("ip", "netns", "add", name)
            sh("ip", "link", "add", f"v{i}", "netns", self.hub, "type", "veth", "peer", "name", "eth0", "netns", name)
            sh(*inside, "link", "set", f"v{i}", "master", "br0", "up")
            node = ("ip", "netns", "exec", name, "ip")
            sh(*node, "link", "set", "lo", "up")
            sh(*node, "addr", "add", f"{self.address(i)}/24", "dev", "eth0")
            sh(*node, "link", "set", "eth0", "up")

    def cut(self, node: int, down: bool) -> None:
        """Of a node from everything; down=False heals it."""
        sh("ip", "netns", "exec", self.hub, "ip", "link", "set", f"v{node}", "down" if down else "up")

    def remove(self) -> None:
        for name in self.left():
            sh("ip", "netns", "del", name, check=False)

    def left(self) -> list[str]:
        """Those of our namespaces that are there."""
        try:
            return [line.split()[0] for line in sh("ip", "netns", "list", check=False).splitlines() if line.split()[0] in (self.hub, *self.names)]
        except OSError:  # no `ip` at all
            return []

    def inside(self, namespace: str, *command: str) -> list[str]:
        """The command line that runs `command` there; exec'd, so the pid is the command's."""
        return ["ip", "netns", "exec", namespace, *command]

    def run(self, namespace: str, *command: str, env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            return subprocess.Popen(self.inside(namespace, *command), env=env, stdout=out, stderr=out,
                                    stdin=subprocess.DEVNULL, start_new_session=True)
