"""In place of torchvision, for tests alone: the names that `import timm` asks for, and no code.

timm needs torchvision for reading pictures and for one kind of norm; the models that we patch need
none of it. The real package is large and fits one build of torch exactly. Put this folder's parent
on the path (`support.timm` does, where there is no torchvision that works; for the benchmark give
`PYTHONPATH=tests/support/stubs`).
"""
