"""The exceptions of this package, one tree, so that an app needs one `except`.

    GptOssError
    ├── ConfigError        config.json is missing, contradictory, or of another model
    ├── CheckpointError    weights are missing, damaged, or not what the config promises
    ├── ConversionError    a conversion cannot start or go on
    ├── VerificationError  what was written or computed is not what it must be
    ├── DownloadError      the hub could not be reached, or sent something else
    ├── ModelNotFoundError a model name that is no folder, no local copy, no known name
    ├── VocabularyError    the vocabulary is damaged or another model's
    ├── HarmonyError       a conversation that cannot be rendered
    ├── CacheError         a K,V cache was asked for what it no longer holds
    ├── ContextLengthError a prompt fills the whole context
    ├── SchemaError        a JSON schema that answers cannot be held to
    ├── RuntimeClosedError a runtime was closed, or came into this process by a fork
    ├── MachineError       a request does not fit this machine's memory
    ├── BenchmarkError     a record of a measurement cannot be read or compared
    ├── KernelError        a Metal kernel was called with what it cannot take
    └── EmulatorError      the Metal emulator found a fault, or cannot run

Every message says what, where, expected, got and what to do, in one line where one line can.
Mistakes of a caller in the same process (a wrong type, an impossible argument) are `ValueError`s.
"""


class GptOssError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(GptOssError):
    """A config.json is missing, contradictory, or describes another model."""


class CheckpointError(GptOssError):
    """Weights are missing, damaged, or not what the config promises."""


class ConversionError(GptOssError):
    """A conversion cannot start or cannot go on; nothing of the user's was changed."""


class VerificationError(GptOssError):
    """What was written or computed differs from what it must be."""


class DownloadError(GptOssError):
    """The hub could not be reached, refused, or sent bytes that do not match their hash."""


class ModelNotFoundError(GptOssError):
    """A model name is no folder, no known name, and has no local copy."""


class VocabularyError(GptOssError):
    """The vocabulary is damaged, or a model folder carries another model's."""


class HarmonyError(GptOssError):
    """A conversation cannot be rendered as harmony tokens."""


class CacheError(GptOssError):
    """A K,V cache was asked for positions that it no longer or not yet holds."""


class ContextLengthError(GptOssError):
    """A prompt is longer than the context of the model."""


class SchemaError(GptOssError):
    """An answer cannot be held to a JSON schema: it is beyond us, or an extra is missing."""


class RuntimeClosedError(GptOssError):
    """A runtime was used after it was closed, or in a forked process that has no owner thread."""


class KernelError(GptOssError):
    """A Metal kernel was called with shapes or dtypes that it cannot take."""


class EmulatorError(GptOssError):
    """The Metal emulator found a fault in a kernel, or cannot run at all."""


class MachineError(GptOssError):
    """A chip or a memory size that no Mac has, or a request that does not fit the memory."""


class BenchmarkError(GptOssError):
    """A record of a measurement cannot be read, or compared with another."""
