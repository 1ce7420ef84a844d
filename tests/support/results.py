"""Results of both kinds, made through `lowkey.publishing`."""

from lowkey.publishing import new_directory, new_file

KINDS = ("file", "directory")


def make(kind, path, what="new", *, replaces=None, meanwhile=lambda: None):
    if kind == "file":
        with new_file(path, replaces=replaces) as temporary:
            temporary.write_text(what)
            meanwhile()
    else:
        with new_directory(path, replaces=replaces) as directory:
            (directory / "content").write_text(what)
            meanwhile()


def content(path):
    return (path if path.is_file() else path / "content").read_text()


def appear(path, kind, what="mine"):
    path.parent.mkdir(exist_ok=True)
    if kind == "directory":
        path.mkdir()
        path = path / "content"
    path.write_text(what)
