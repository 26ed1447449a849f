from .loading import LoadedConfig as LoadedConfig
from .loading import load as load
from .predicting import predict as predict

__version__: str
