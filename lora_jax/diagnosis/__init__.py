"""What an update does to a weight: its size, its directions, and what it adds to the weight's own.

`spectra` has the linear algebra of one matrix, `measure` what is computed of one target, `walk` the
walk over the trees, `report` what is returned, and `repair` shrinks intruder dimensions.
"""

from lora_jax.diagnosis.report import Diagnosis as Diagnosis
from lora_jax.diagnosis.report import Intruders as Intruders
from lora_jax.diagnosis.report import Overlap as Overlap
from lora_jax.diagnosis.report import TargetDiagnosis as TargetDiagnosis
from lora_jax.diagnosis.walk import diagnose as diagnose
