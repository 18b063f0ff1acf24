"""Verification of an adapter: `norms` measures its updates, `coverage` which weights it reaches,
`bound` runs it, `merged` merges it and compares logits, `report` holds the findings."""

from lora_jax.interop.verify.report import Finding as Finding
from lora_jax.interop.verify.report import Form as Form
from lora_jax.interop.verify.report import Report as Report
from lora_jax.interop.verify.report import Target as Target
from lora_jax.interop.verify.verify import FORMS as FORMS
from lora_jax.interop.verify.verify import verify as verify
