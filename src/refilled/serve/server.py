"""The HTTP server, which runs until Ctrl-C or SIGTERM."""

import signal
import socket
from collections.abc import Callable
from pathlib import Path

from refilled.errors import RunError

_CONNECTIONS = 256
_SECONDS_TO_FINISH = 5


def serve(
    folder: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    nearest: bool = True,
    teacher: bool = False,
    max_bytes: int = 32 * 2**20,
    max_pixels: int = 50_000_000,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Serve a run's student until Ctrl-C or SIGTERM, and complete the requests in progress.

    Args:
        folder: The run's folder.
        host: Address to listen on. Only this machine can reach a loopback address.
        port: Port to listen on. 0: a free one.
        nearest: Whether to show the nearest training images.
        teacher: Whether to show the teacher's nearest class means.
        max_bytes: Maximum size of a request in bytes.
        max_pixels: Maximum number of pixels per picture.
        say: Called with the address and with notes.

    Raises:
        RunError: A package is missing, the address cannot be used, or the folder holds no student.
    """
    try:
        import python_multipart  # noqa: F401
        import uvicorn

        from refilled.serve.app import is_loopback, make_app
    except ModuleNotFoundError as error:
        raise RunError(f"serving needs the package {error.name}: pip install 'refilled[serve]'") from None
    from refilled.serve.engine import Engine

    with _listening(host, port) as listener:
        engine = Engine(folder, nearest, teacher, max_pixels)
        for note in engine.notes:
            say(f"note: {note}")
        if not is_loopback(host):
            say(
                "note: anyone who reaches this machine can use the server and see training images; there is no password"
            )
        shown = f"[{host}]" if ":" in host else host
        config = uvicorn.Config(
            make_app(engine, max_bytes, host),
            log_level="warning",
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=_SECONDS_TO_FINISH,
            server_header=False,
        )
        server = uvicorn.Server(config)
        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn ends first, then raises the signal again
            signal.signal(number, lambda *_: None)
        say(f"serving {folder} at http://{shown}:{listener.getsockname()[1]}/ until Ctrl-C")
        server.run(sockets=[listener])
    say("stopped")


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    except OSError as error:
        raise RunError(f"'{host}' is not an address of this machine: {error.strerror}") from error
    try:
        listener.bind(address)
        listener.listen()  # otherwise a second server could bind the same port
    except OSError as error:
        listener.close()
        raise RunError(
            f"port {port} of {host} cannot be used: {(error.strerror or str(error)).lower()}; choose another --port"
        ) from error
    return listener
