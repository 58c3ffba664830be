"""generate.py and evaluate_llava.py in one launch: to import PyTorch is most of what two would cost.

... generate_and_evaluate.py <flags of generate.py> -- <flags of evaluate_llava.py>
"""

import runpy
import sys

words = sys.argv[1:]
middle = words.index("--")
for command, flags in (("generate", words[:middle]), ("evaluate_llava", words[middle + 1 :])):
    sys.argv = [f"scripts/{command}.py", *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")
