"""TLS between services, mutual by default, switched on by one variable: `MIAOTUI_TLS_DIR`.

The directory holds `ca.crt`, `tls.crt` and `tls.key` (PEM), as a Kubernetes TLS secret does.
Every gRPC server of this process then answers only over TLS, and every channel verifies its
server against `ca.crt`. Files are read when a server takes a connection and when a channel
opens, so a renewed certificate needs no restart.
"""

from __future__ import annotations

import logging
from pathlib import Path

import grpc
from pydantic import AliasChoices, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

log = logging.getLogger(__name__)

CA, CERTIFICATE, KEY = "ca.crt", "tls.crt", "tls.key"


class TlsSettings(BaseSettings):
    """What all services take; it holds for every gRPC server and channel of the process.

    From the environment only: channels are opened far from any settings object.
    """

    model_config = SettingsConfigDict(extra="ignore")

    tls_dir: Path | None = Field(
        default=None,
        validation_alias=AliasChoices("MIAOTUI_TLS_DIR"),
        description=f"Directory with {CA}, {CERTIFICATE} and {KEY}; empty: no TLS",
    )
    tls_mutual: bool = Field(
        default=True,
        validation_alias=AliasChoices("MIAOTUI_TLS_MUTUAL"),
        description="Whether a gRPC server refuses clients without a certificate of the CA",
    )
    tls_server_name: str = Field(
        default="",
        validation_alias=AliasChoices("MIAOTUI_TLS_SERVER_NAME"),
        description="Name that servers' certificates must have; empty: the host that is called",
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_is_none(cls, values: dict[str, object]) -> dict[str, object]:
        if values.get("MIAOTUI_TLS_DIR") == "":
            return {**values, "MIAOTUI_TLS_DIR": None}
        return values

    @model_validator(mode="after")
    def _server_files_exist(self) -> TlsSettings:
        if self.tls_dir is not None:
            missing = [n for n in (CA, CERTIFICATE, KEY) if not (self.tls_dir / n).is_file()]
            if missing:
                raise ValueError(f"MIAOTUI_TLS_DIR: {self.tls_dir} lacks {', '.join(missing)}")
        return self


def channel_credentials() -> tuple[grpc.ChannelCredentials, str] | None:
    """Credentials of a channel, and the server name to expect ("": the host called).

    `None`: plain text. Raises `OSError` where the files cannot be read.
    """
    settings = _ClientSettings()
    if settings.tls_dir is None:
        return None
    ca, *own = (settings.tls_dir / name for name in (CA, KEY, CERTIFICATE))
    key, certificate = (path.read_bytes() if path.is_file() else None for path in own)
    credentials = grpc.ssl_channel_credentials(ca.read_bytes(), key, certificate)
    return credentials, settings.tls_server_name


def blocking_channel(target: str) -> grpc.Channel:
    """A channel for code without an event loop, over TLS where `MIAOTUI_TLS_DIR` is set."""
    tls = channel_credentials()
    if tls is None:
        return grpc.insecure_channel(target)
    credentials, name = tls
    options = [("grpc.ssl_target_name_override", name)] if name else []
    return grpc.secure_channel(target, credentials, options=options)


def server_credentials() -> grpc.ServerCredentials | None:
    """Credentials of a server; `None`: plain text.

    They follow the files: a changed certificate or CA holds for the next connection. Raises
    `ValueError` where files are missing, `OSError` where they cannot be read.
    """
    settings = TlsSettings()
    if settings.tls_dir is None:
        return None
    directory = settings.tls_dir

    def read() -> tuple[bytes, bytes, bytes]:
        ca, certificate, key = ((directory / name).read_bytes() for name in (CA, CERTIFICATE, KEY))
        return ca, certificate, key

    def configuration(
        files: tuple[bytes, bytes, bytes],
    ) -> grpc.ServerCertificateConfiguration:
        ca, certificate, key = files
        return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=ca)

    current = read()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal current
        try:
            files = read()
        except OSError as error:
            log.warning("certificates in %s cannot be read: %s", directory, error.strerror)
            return None
        if files == current:
            return None
        current = files
        log.info("certificates in %s have changed", directory)
        return configuration(files)

    return grpc.dynamic_ssl_server_credentials(
        configuration(current),
        fetch,  # type: ignore[arg-type]  # the stubs lack None, which means "as before"
        require_client_authentication=settings.tls_mutual,
    )


class _ClientSettings(TlsSettings):
    """A client needs `ca.crt` alone where servers do not ask for more."""

    @model_validator(mode="after")
    def _server_files_exist(self) -> _ClientSettings:
        if self.tls_dir is not None and not (self.tls_dir / CA).is_file():
            raise ValueError(f"MIAOTUI_TLS_DIR: {self.tls_dir} lacks {CA}")
        return self
