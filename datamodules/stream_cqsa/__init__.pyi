from .datamodule import ByteTextDataModule as ByteTextDataModule
from .datamodule import NeedleDataModule as NeedleDataModule
from .needle import NeedleOptions as NeedleOptions
from .needle import NeedleSizes as NeedleSizes
from .needle import NeedleTask as NeedleTask
from .text import ByteText as ByteText
from .text import cached_text as cached_text
