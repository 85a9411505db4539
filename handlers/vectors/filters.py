"""Filters of Milvus requests, built from validated ids only (pure).

If the server supports template parameters, the values are passed separately from the text of the filter.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from ..jobstore.erasures import Scope
from .ports import SearchFilter
from .schema import check_id, check_int64, check_segment_type


class Condition(NamedTuple):
    """Condition on one field; `operator` is `==`, `>`, `>=`, `<=` or `in`; only `in` has a list of values."""

    field: str
    operator: str
    value: str | int | list[str]

    @property
    def literal(self) -> str:
        """Filter text with the quoted value; no character that the checks permit needs escaping."""
        if isinstance(self.value, int):
            return f"{self.field} {self.operator} {self.value}"
        values = [self.value] if isinstance(self.value, str) else self.value
        quoted = ", ".join(f'"{value}"' for value in values)
        return f"{self.field} {self.operator} {f'[{quoted}]' if self.operator == 'in' else quoted}"

    @property
    def parameter(self) -> str:
        """Name of its template parameter: the two bounds of a range are on one field."""
        return self.field + {">=": "_from", "<=": "_to"}.get(self.operator, "")

    @property
    def template(self) -> str:
        """Filter text with the template parameter."""
        return f"{self.field} {self.operator} {{{self.parameter}}}"


class Filter(tuple[Condition, ...]):
    """Conjunction of conditions with different parameters; `a & b` joins two filters."""

    def __and__(self, other: "Filter") -> "Filter":
        return Filter((*self, *other))

    def arguments(self, *, templates: bool) -> dict[str, Any]:
        """Arguments for the client; `templates`: whether the server supports template parameters."""
        if not templates or not self:
            return {"filter": " and ".join(one.literal for one in self)}
        return {
            "filter": " and ".join(one.template for one in self),
            "filter_params": {one.parameter: one.value for one in self},
        }


#: Every row.
EVERYTHING = Filter()


def of_scope(tenant_id: str, project_id: str) -> Filter:
    """Rows of one tenant and project. Raises PermanentStoreError for an invalid id, as all do."""
    return Filter(
        [
            Condition("tenant_id", "==", check_id("tenant_id", tenant_id)),
            Condition("project_id", "==", check_id("project_id", project_id)),
        ]
    )


def of_ids(ids: Iterable[str]) -> Filter:
    """Rows by id, of any tenant; Milvus reads them directly by primary key."""
    return Filter([Condition("id", "in", [check_id("id", value) for value in ids])])


def of_erased(scope: Scope) -> Filter:
    """Rows of a scope, without its ids."""
    conditions = [Condition("tenant_id", "==", check_id("tenant_id", scope.tenant_id))]
    if scope.project_id:
        conditions.append(Condition("project_id", "==", check_id("project_id", scope.project_id)))
    if scope.chapter_ids:
        chapters = [check_id("chapter_id", value) for value in scope.chapter_ids]
        conditions.append(Condition("chapter_id", "in", chapters))
    return Filter(conditions)


def of_chapter(chapter_id: str) -> Filter:
    """Rows of a chapter, of any tenant."""
    return Filter([Condition("chapter_id", "==", check_id("chapter_id", chapter_id))])


def after(id_: str) -> Filter:
    """Rows whose id is greater than `id_`; all rows if it is empty."""
    return Filter([Condition("id", ">", check_id("id", id_) if id_ else "")])


def of_search(where: SearchFilter) -> Filter:
    """Rows that a search may find, of any tenant."""
    conditions = []
    if where.chapter_ids:
        chapters = [check_id("chapter_id", value) for value in where.chapter_ids]
        conditions.append(Condition("chapter_id", "in", chapters))
    if where.segment_types:
        types = [check_segment_type(value) for value in where.segment_types]
        conditions.append(Condition("segment_type", "in", types))
    if where.story_time_from is not None:
        conditions.append(
            Condition("story_time", ">=", check_int64("story_time_from", where.story_time_from))
        )
    if where.story_time_to is not None:
        conditions.append(Condition("story_time", "<=", check_int64("story_time_to", where.story_time_to)))
    return Filter(conditions)
