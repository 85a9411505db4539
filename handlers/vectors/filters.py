"""Filters for a Milvus server, built from checked ids only (pure).

If the server takes template parameters, the values are passed beside the text of the filter."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from .schema import check_id


class Condition(NamedTuple):
    """What one field must be: `how` is `==`, `>` or `in`; only for `in` there are several values."""

    field: str
    how: str
    value: str | list[str]

    @property
    def literal(self) -> str:
        """With the value quoted; no character that `check_id` lets through needs an escape."""
        values = [self.value] if isinstance(self.value, str) else self.value
        quoted = ", ".join(f'"{value}"' for value in values)
        return f"{self.field} {self.how} {f'[{quoted}]' if self.how == 'in' else quoted}"

    @property
    def template(self) -> str:
        """With a name for the value, which is that of the field."""
        return f"{self.field} {self.how} {{{self.field}}}"


class Filter(tuple[Condition, ...]):
    """Rows for which all conditions hold, each on another field; `a & b` joins two."""

    def __and__(self, other: "Filter") -> "Filter":
        return Filter((*self, *other))

    def arguments(self, *, templates: bool) -> dict[str, Any]:
        """What to give the client; `templates`: whether the server takes values beside the text."""
        if not templates or not self:
            return {"filter": " and ".join(one.literal for one in self)}
        return {
            "filter": " and ".join(one.template for one in self),
            "filter_params": {one.field: one.value for one in self},
        }


#: Every row there is.
EVERYTHING = Filter()


def of_scope(tenant_id: str, project_id: str) -> Filter:
    """Rows of one tenant and project. As all here, raises PermanentStoreError for what is no id."""
    return Filter(
        [
            Condition("tenant_id", "==", check_id("tenant_id", tenant_id)),
            Condition("project_id", "==", check_id("project_id", project_id)),
        ]
    )


def of_ids(ids: Iterable[str]) -> Filter:
    """Rows by id, of any tenant; Milvus answers it by point reads."""
    return Filter([Condition("id", "in", [check_id("id", value) for value in ids])])


def of_chapter(chapter_id: str) -> Filter:
    """Rows of a chapter, of any tenant."""
    return Filter([Condition("chapter_id", "==", check_id("chapter_id", chapter_id))])


def behind(after: str) -> Filter:
    """Rows whose id stands behind this one; behind the empty one all do."""
    return Filter([Condition("id", ">", check_id("id", after) if after else "")])
