"""How the processes of one run learn that one of them has died, and end: in one sentence that says how to go on.

1. Every process holds a connection to the first one for as long as it works. The kernel closes it when a process ends,
   however it does; when a host goes down, it is missed after `SILENCE` seconds. JAX by itself would wait for 100, and
   then end each process from C++, by a stack trace.
2. A process that ends well says so before, and so does one that ends with an error of its own; the others then wait a
   moment, as they may be about to tell the same error.
3. The first process tells the others; if it is itself the one that has died, each of them tells. After a death they may
   be started again, after an error of another process not: its own start would be what is missing.
4. A process that waits in vain for another, at the start or later, ends in a sentence too (`deadlines`). It may be
   started again: who was late once need not be again.
5. While processes are joined, what C++ libraries write to stderr goes into a file. Of a process that dies of an error
   that nobody foresaw its end is shown; of one that another takes along it would bury the sentence.

`joined` does all of this around a command.
"""

import atexit
import contextlib
import ctypes
import json
import logging
import os
import secrets
import select
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from difffract_jax.config import SharedError, UserError
from difffract_jax.transcoders.deadlines import is_deadline, not_together, waited
from difffract_jax.transcoders.processes import everywhere, is_first, join_processes, texts
from difffract_jax.transcoders.settings import SUPERVISED, TRY_AGAIN

SILENCE = 30
"""Seconds without an answer from a host after which it counts as dead."""
GRACE = 5.0
"""Seconds that processes are given to end by themselves when another has ended with an error."""
SHOWN = 4000
"""Bytes of the C++ libraries' messages that are shown."""
SHORT = 200
"""Characters of a message that are part of a sentence."""


def failed_status() -> int:
    """Returns the exit status of a process that has failed without a mistake of the user's."""
    return TRY_AGAIN if SUPERVISED in os.environ else 1


@contextlib.contextmanager
def joined(text: str | None, advice: Callable[[], str]) -> Iterator[None]:
    """Makes this process one of several for a block, and ends it if another one dies.

    Args:
        text: as for `processes.join_processes`; None for a process that works alone.
        advice: returns what to do then, as a part of a sentence.

    Raises:
        UserError: if the others cannot be found.
    """
    if text is None:
        yield
        return
    with _own_stderr() as stderr:
        with _coming_together(text, advice, stderr):
            join_processes(text)
            line = _Line(advice, stderr)
        try:
            yield
        except SharedError:
            line.close("well")
            raise
        except UserError:
            line.close("error")
            raise
        except (ValueError, OSError, RuntimeError) as error:
            # A communication that another's death has cut off fails here: the thread is about to say so.
            time.sleep(GRACE)
            if isinstance(error, RuntimeError) and is_deadline(str(error)):
                line.end_late(str(error))
            line.close("error")
            raise
        except BaseException:
            line.close("error")
            raise
        else:
            line.close("well")


@contextlib.contextmanager
def _coming_together(text: str, advice: Callable[[], str], stderr: int) -> Iterator[None]:
    """Ends this process in one sentence if others do not come within a block, or have ended; arguments as of `_Line`.

    Without leaving Python as usual, where JAX would wait for the others once more.
    """

    def end(reason: str) -> None:
        try:
            os.write(stderr, f"Error: {reason}; {advice()}\n".encode())
        finally:  # also where the run's disk is gone, which the advice looks at
            os._exit(failed_status())

    def aborted() -> None:
        # The file of what C++ has written, which may begin with thousands of characters of warnings.
        said = os.pread(2, os.fstat(2).st_size, 0).decode(errors="replace")
        last = " ".join(said.rpartition("Terminating process")[2].split())
        end(not_together(said, text) or f"The processes could not be joined ({last[:SHORT]})")

    kept = _on_abort(aborted)
    try:
        yield
    except BaseException as error:
        reason = not_together(str(error), text) if isinstance(error, RuntimeError) else None
        if reason is not None:
            end(reason)
        _default_abort()
        raise
    del kept  # which C++ may call until here: from now on it calls the one of `_Line`


class _Line:
    """The connections of a process: the first has one to every other, the others one to the first."""

    def __init__(self, advice: Callable[[], str], stderr: int) -> None:
        self._advice, self._stderr, self._closed, self._ending = advice, stderr, False, False
        self._hosts = texts(socket.gethostname())
        self._peers = self._connected()
        if not everywhere(len(self._peers) == (jax.process_count() - 1 if is_first() else 1)) and is_first():
            logging.getLogger(__name__).warning(
                "hosts do not reach one another's ports, so that only JAX notices when one has died, after 100 s."
            )
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()
        self._handler = _on_abort(lambda: self._end("Another process has died", True))

    def _connected(self) -> dict[int, socket.socket]:
        """Returns the connections by the other side's number; none where hosts do not reach one another's ports."""
        number, count = jax.process_index(), jax.process_count()
        with _listening() if number == 0 else contextlib.nullcontext() as server:
            port = 0 if server is None else server.getsockname()[1]
            mine = {"addresses": _addresses(), "port": port, "word": secrets.token_hex(16)} if number == 0 else {}
            first = json.loads(texts(json.dumps(mine))[0])
            peers: dict[int, socket.socket] = {}
            if server is not None:
                server.settimeout(GRACE * 4)
                with contextlib.suppress(OSError):
                    while len(peers) < count - 1:
                        peer, _ = server.accept()
                        peer.settimeout(GRACE)  # whoever it is: only the run's processes know the word
                        word, _, sender = _line_of(peer).partition(" ")
                        if word == first["word"] and sender.isdecimal():
                            peers[int(sender)] = peer
            else:
                peer = _reach(first["addresses"], first["port"])
                if peer is not None:
                    peer.sendall(f"{first['word']} {number}\n".encode())
                    peers[0] = peer
        for peer in peers.values():
            _notice_silence(peer)
        return peers

    def close(self, how: str) -> None:
        """Tells the others that this process ends, `well` or with an `error`, and watches no longer."""
        self._closed = True
        _default_abort()
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(f"{how}\n".encode())
        if how == "error":
            # JAX would wait at the exit for processes that have ended.
            atexit.register(_leave)

    def end_late(self, said: str) -> None:
        """Ends this process, which has waited for another in vain, as JAX says; all may be started again."""
        self._ending = True
        seconds = waited(said)
        this = f"Process {jax.process_index()} on {self._hosts[jax.process_index()]}"
        how_long = f" for {seconds:g} s" if seconds else ""
        self._end(f"{this} has waited{how_long} in vain for another at a computation that they share", True)

    def _watch(self) -> None:
        open_peers = {peer: number for number, peer in self._peers.items()}
        while open_peers and not self._closed:
            for peer in select.select(list(open_peers), [], [], 0.5)[0]:
                said, number = _line_of(peer), open_peers.pop(peer)
                if self._closed or said == "well":
                    continue
                if said == "error":
                    time.sleep(GRACE)
                if not (self._closed or self._ending):
                    what = "has ended with an error" if said == "error" else "has died"
                    told = said.startswith("told")
                    self._end(
                        f"Process {number} on {self._hosts[number]} {what}",
                        not told and not self._quiet(said),
                        mistaken=said.endswith("error"),
                    )

    def _quiet(self, said: str) -> bool:
        """Says whether the first process has told its error itself."""
        return said == "error" and not is_first()

    def _end(self, what: str, speaks: bool, *, mistaken: bool = False) -> None:
        """Ends this process; `mistaken` if another start would not help.

        The first one tells the others before, and one that has waited in vain tells the first, which then says no more.
        """
        if self._closed:
            return
        if is_first() or self._ending:
            for peer in self._peers.values():
                with contextlib.suppress(OSError):
                    peer.sendall(b"told error\n" if mistaken else b"told\n")
        try:
            if speaks:
                # Without a full stop: it ends with a command.
                sentence = f"Error: {what}, which ends all {len(self._hosts)} processes; {self._advice()}\n"
                os.write(self._stderr, sentence.encode())
            time.sleep(0.2 if is_first() else 0)
        finally:  # also where the run's disk is gone, which the advice looks at, or nobody reads stderr
            os._exit(1 if mistaken else failed_status())


def _addresses() -> list[str]:
    """Returns under which names and numbers other hosts may reach this one."""
    found = []
    for family, outside in ((socket.AF_INET, "8.8.8.8"), (socket.AF_INET6, "2001:4860:4860::8888")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((outside, 53))  # sends nothing: it says which of this host's addresses leads outside
            found.append(probe.getsockname()[0])
    return [*found, socket.gethostname()]


def _listening() -> socket.socket:
    """Returns a socket that hosts can connect to at a free port."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _reach(addresses: list[str], port: int) -> socket.socket | None:
    """Connects to the first of some addresses that answers; this host's own last, for processes side by side."""
    for address in (*addresses, "localhost"):
        with contextlib.suppress(OSError):
            return socket.create_connection((address, port), timeout=GRACE)
    return None


def _notice_silence(peer: socket.socket) -> None:
    """Makes the kernel close a connection whose other side does not answer for `SILENCE` seconds."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", SILENCE // 3), ("TCP_KEEPINTVL", SILENCE // 6), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _line_of(peer: socket.socket) -> str:
    """Reads a line; what there was of it if the connection has ended."""
    text = b""
    with contextlib.suppress(OSError):
        while not text.endswith(b"\n") and (more := peer.recv(1)):
            text += more
    return text.decode(errors="replace").strip()


@contextlib.contextmanager
def _own_stderr() -> Iterator[int]:
    """Keeps stderr for Python, and hands out its descriptor; what C++ writes there goes into a file."""
    python, before = os.dup(2), sys.stderr
    stream = os.fdopen(os.dup(python), "w", buffering=1, encoding=before.encoding)
    with tempfile.TemporaryFile() as messages, stream:
        os.dup2(messages.fileno(), 2)
        sys.stderr = stream
        try:
            yield python
        except UserError:
            raise
        except (ValueError, OSError, RuntimeError, AssertionError, MemoryError, TypeError, KeyError):
            messages.seek(max(0, messages.tell() - SHOWN))
            os.write(python, messages.read())
            raise
        finally:
            sys.stderr = before
            os.dup2(python, 2)


def _on_abort(work: Callable[[], Any]) -> Any:
    """Has work done when C++ aborts this process, as JAX does when the first process is gone.

    The thread that watches is given a moment: it knows which process it was.
    """
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)

    def handler(number: int) -> None:
        del number
        time.sleep(0.3)
        work()

    kept = kind(handler)
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = [ctypes.c_int, kind], ctypes.c_void_p
    library.signal(signal.SIGABRT, kept)
    return kept


def _default_abort() -> None:
    """Has C++ end this process as it does by default."""
    ctypes.CDLL(None).signal(signal.SIGABRT, 0)


def _leave() -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(1)
