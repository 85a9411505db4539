"""The embedded Milvus Lite server of a service without ``--milvus-uri``."""

import sys
from importlib.util import find_spec
from pathlib import Path

from jobworker.handlers import NEEDS_VECTORS
from jobworker.worker import ConfigurationError
from jobworker.worker.extension import how_to_install
from jobworker.worker.host.data_dir import HOST, DataDir, free_port, kept_secret, private_folder, socket_path

from ...settings import HandlerSettings


class EmbeddedMilvus:
    """Process of `lite_server`, with its folder, token and port."""

    name = "milvus"

    def __init__(self, data: DataDir) -> None:
        if find_spec("milvus_lite") is None:
            raise ConfigurationError(
                f"no --milvus-uri, and no embedded Milvus Lite is installed: {how_to_install('embedded')}"
            )
        self._dir = private_folder(data.path / "milvus")
        self._token_file = data.path / "milvus.token"
        self._token = kept_secret(self._token_file, user="root")
        self._port_file = data.path / "milvus.port"
        self._port_file.unlink(missing_ok=True)
        self._port = free_port(data.endpoints().get("milvus_uri"))
        self._socket_file = data.path / "milvus.sock"
        self._socket = socket_path(data.path, self._socket_file.name)

    @classmethod
    def needed(cls, settings: HandlerSettings) -> bool:
        """Whether no URI was given and a handler needs one."""
        return not settings.milvus_uri and any(one in NEEDS_VECTORS for one in settings.handlers.values())

    def settings(self) -> dict[str, str]:
        """Settings for the service's processes: only this user can listen there and get the token."""
        return {"milvus_uri": f"unix:{self._socket}", "milvus_token": self._token}

    def endpoints(self) -> dict[str, str]:
        """Its address for tools."""
        return {"milvus_uri": self.url}

    def folders(self) -> list[Path]:
        """Where it keeps its data."""
        return [self._dir]

    def remove_socket(self) -> None:
        """Remove its Unix socket, which a killed server leaves."""
        self._socket_file.unlink(missing_ok=True)

    @property
    def url(self) -> str:
        """Address for clients on this machine. Contains the token as user and password: never log it."""
        return f"http://{self._token}@{HOST}:{self._port}"

    def command(self) -> list[str]:
        """Command line of the server, which writes the port file when it is ready.

        The port changes if another program has taken it.
        """
        self._port_file.unlink(missing_ok=True)
        self._port = free_port(self.url)
        return [
            sys.executable, "-P", "-m", "jobworker.handlers.vectors.milvus.lite_server",
            "--data-dir", str(self._dir),
            "--port", str(self._port), "--port-file", str(self._port_file),
            "--token-file", str(self._token_file), "--socket", self._socket,
        ]  # fmt: skip

    def answers(self) -> bool:
        """Whether it is ready, with all collections loaded."""
        return self._port_file.exists()
