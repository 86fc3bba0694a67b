"""A small training job in several ways, step by step side by side, and which way is the one to use.

`task` is what is trained, `ways` names the ways and `changing` does them, `trainee` takes the steps and `processes`
lets two share them, `comparing` runs it all, `way_result` and `result` are what comes out, `verdict` judges.
"""
