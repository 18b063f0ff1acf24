"""Whether an adapter does what it should: `norms` measures its updates, `coverage` what it reaches,
`bound` runs it, `forms` are other ways to hold it, `report` says what was found."""

from lora_jax.interop.verify.report import Finding as Finding
from lora_jax.interop.verify.report import Form as Form
from lora_jax.interop.verify.report import Report as Report
from lora_jax.interop.verify.report import Target as Target
from lora_jax.interop.verify.verify import FORMS as FORMS
from lora_jax.interop.verify.verify import verify as verify
