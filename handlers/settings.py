"""Settings of the built-in job types, beside those of the engine."""

from dataclasses import dataclass
from typing import ClassVar

from jobworker.worker import Settings


@dataclass(frozen=True)
class HandlerSettings(Settings):
    """Every option of the service. Times in seconds, sizes in bytes; urls may hold secrets."""

    secret_urls: ClassVar[tuple[str, ...]] = ("redis_url", "milvus_uri", "llm_url", "postgres_dsn")
    secret_tokens: ClassVar[tuple[str, ...]] = ("milvus_token",)
    secret_files: ClassVar[tuple[str, ...]] = ("serve_token_file", "llm_key_file")

    milvus_uri: str = ""
    milvus_token: str = ""
    milvus_prefix: str = "z_novel_"
    milvus_partitions: str = "key"
    model: str = ""
    long_text: str = "windows"
    token_budget: int = 65536
    dtype: str = "auto"
    sparse: str = "auto"
    #: 0: no cache. In settings of their own, as tests make them, nothing is put on the disk.
    cache_bytes: int = 0
    serve_model_names: tuple[str, ...] = ()
    #: Longer than the longest time between the creation of a job and its last try.
    tombstone_ttl_s: float = 30 * 86_400.0
    summary_chars: int = 100
    llm_url: str = ""
    llm_model: str = ""
    llm_key_file: str = ""
    llm_timeout_s: float = 60.0
    summary_sink: str = ""
    postgres_dsn: str = ""
