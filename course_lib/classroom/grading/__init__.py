"""Grades a folder of submissions: `course grade submitted/ --out graded/`.

A submission is material, never code of ours. Its answer cells go into the instructor's notebook
(`collect`, `graft`), which nbval runs (`run`, `plugin`) with a kernel in a sandbox (`isolate`,
`course_copy`). The answer is asked from outside (`asking`) over a line that ends in the kernel
(`answering`); what is right never enters it. `marks` keeps the results, `report` shows them.
"""
