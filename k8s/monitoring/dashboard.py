"""Builds the Grafana dashboard from the panels with Grafana's own foundation SDK."""

import json
from collections.abc import Callable, Mapping
from typing import Final

from grafana_foundation_sdk.builders import common, stat, statetimeline, timeseries
from grafana_foundation_sdk.builders import dashboard as board
from grafana_foundation_sdk.builders import prometheus as prom
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as model_common
from grafana_foundation_sdk.models import dashboard as model

from k8s.monitoring.panels import ROWS, Kind, Panel
from k8s.monitoring.promql import PHASES

UID: Final = "hybrid-log-sidecar"
_SOURCE: Final = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
_COLOURS: Final = ("blue", "yellow", "orange", "green")
_HEIGHT: Final[Mapping[Kind, int]] = {"timeseries": 8, "stat": 4, "phases": 6}

_Builder = timeseries.Panel | stat.Panel | statetimeline.Panel


def build() -> str:
    """The dashboard as JSON text, ready for a ConfigMap."""
    whole = (
        board.Dashboard("Hybrid log sidecar: the migration")
        .uid(UID)
        .description("From PostgreSQL to DynamoDB: the phase, the delivery, and whether the stores agree.")
        .tags(["hybrid-log-sidecar", "migration"])
        .refresh("30s")
        .time("now-6h", "now")
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .readonly()
    )
    for variable in _variables():
        whole = whole.with_variable(variable)
    for row in ROWS:
        whole = whole.with_row(board.Row(row.title))
        for panel in row.panels:
            whole = whole.with_panel(_panel(panel))
    tree = json.loads(json.dumps(whole.build(), cls=JSONEncoder))
    for entry in tree["templating"]["list"]:
        for name in ("auto", "auto_count", "auto_min"):
            entry.pop(name, None)  # an interval variable's; the SDK writes them on all, and Grafana's types refuse it
    return json.dumps(tree, indent=2, sort_keys=True) + "\n"


def _variables() -> tuple[board.DatasourceVariable | board.QueryVariable, ...]:
    def label(name: str, within: str) -> board.QueryVariable:
        return (
            board.QueryVariable(name)
            .label(name.capitalize())
            .query(f"label_values(sidecar_config_info{within}, {name})")
            .datasource(_SOURCE)
            .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(model.VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(model.VariableOption(text="All", value="$__all", selected=True))
        )

    return (
        board.DatasourceVariable("datasource").label("Data source").type("prometheus"),
        label("namespace", ""),
        label("app", '{namespace=~"$namespace"}'),
        label("pod", '{namespace=~"$namespace",app=~"$app"}'),
    )


def _timeseries() -> _Builder:
    return (
        timeseries.Panel()
        .legend(
            common.VizLegendOptions()
            .display_mode(model_common.LegendDisplayMode.LIST)
            .placement(model_common.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(model_common.TooltipDisplayMode.MULTI))
        .fill_opacity(10)
        .line_width(1)
        .show_points(model_common.VisibilityMode.NEVER)
        .min(0)
    )


def _stat() -> _Builder:
    return stat.Panel().reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))


def _phases() -> _Builder:
    names = model.ValueMap(
        options={
            str(number): model.ValueMappingResult(text=name, color=colour, index=number)
            for number, (name, colour) in enumerate(zip(PHASES, _COLOURS, strict=True))
        }
    )
    return statetimeline.Panel().merge_values(True).mappings([names])


_KINDS: Final[Mapping[Kind, Callable[[], _Builder]]] = {
    "timeseries": _timeseries,
    "stat": _stat,
    "phases": _phases,
}


def _panel(panel: Panel) -> _Builder:
    built = (
        _KINDS[panel.kind]()
        .title(panel.title)
        .description(panel.description)
        .datasource(_SOURCE)
        .unit(panel.unit)
        .span(panel.width)
        .height(_HEIGHT[panel.kind])
    )
    for number, query in enumerate(panel.queries):
        built = built.with_target(
            prom.Dataquery().expr(query.expr).legend_format(query.legend).range().ref_id(chr(ord("A") + number))
        )
    return built
