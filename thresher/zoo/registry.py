"""Every model a YAML file can name, and the run configuration over them."""

from typing import Annotated

from pydantic import Field

from thresher.trainer import config
from thresher.zoo.dcnv2.model import DcnV2Config
from thresher.zoo.deepfm.model import DeepFmConfig
from thresher.zoo.din.model import DinConfig
from thresher.zoo.dlrm.model import DlrmConfig
from thresher.zoo.fm.model import FmConfig
from thresher.zoo.lr.model import LrConfig
from thresher.zoo.sasrec.model import SasRecConfig
from thresher.zoo.transformer.config import TransformerConfig

AnyModel = Annotated[
    LrConfig | FmConfig | DeepFmConfig | DlrmConfig | DcnV2Config | DinConfig | SasRecConfig | TransformerConfig,
    Field(discriminator="name"),
]
"""The configuration of any model, chosen by ``name``."""

RunConfig = config.RunConfig[AnyModel]
"""A run of any model of the zoo: ``load_config(RunConfig, path, overrides)``."""
