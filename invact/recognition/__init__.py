"""What a model computes, told by running it and never from a name: curves, expressions in methods, norms.

`curves` knows modules, `expressions` what methods write out, `norms_in_steps` norms. Copies are run, never the model.
What the code reads besides its input is told too (`dependencies`), since what was recognised holds only while that is
the same.
"""

from invact.recognition.curves import recognise
from invact.recognition.expressions import written_in
from invact.recognition.found_site import Found
from invact.recognition.norms_in_steps import FoundNorm, walk_norms

__all__ = ["Found", "FoundNorm", "recognise", "walk_norms", "written_in"]
