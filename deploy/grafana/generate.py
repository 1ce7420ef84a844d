"""Write the Grafana dashboard: dense and reduced side by side.

.cache/deploy-venv/bin/python deploy/grafana/generate.py deploy/grafana/lowkey.json     # after make deploy-check
"""

import sys
from pathlib import Path

from grafana_foundation_sdk.builders.common import VizLegendOptions
from grafana_foundation_sdk.builders.dashboard import Dashboard, DatasourceVariable, QueryVariable, Row
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.stat import Panel as Stat
from grafana_foundation_sdk.builders.timeseries import Panel as TimeSeries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

SOURCE = DataSourceRef(type_val="prometheus", uid="$datasource")
IN_USE = 'state!="free"'
CHOSEN = '{job=~"$job", variant=~"$variant"}'


def chosen(more: str = "") -> str:
    """The label matcher of every query, with one more condition."""
    return CHOSEN if not more else f"{CHOSEN[:-1]}, {more}}}"


def rate(counter: str) -> str:
    """Per second."""
    return f"rate({counter}{CHOSEN}[$__rate_interval])"


def share(part: str, whole: str, by: str = "variant") -> str:
    """Quotient of two counters' rates."""
    return f"sum by ({by}) ({rate(part)}) / sum by ({by}) ({rate(whole)})"


def queries(panel: TimeSeries | Stat, *targets: tuple[str, str]) -> TimeSeries | Stat:
    """Add (expression, legend) pairs."""
    for ref, (expr, legend) in zip("ABCDEF", targets, strict=False):
        panel.with_target(Dataquery().ref_id(ref).datasource(SOURCE).expr(expr).legend_format(legend))
    return panel


def graph(title: str, unit: str, description: str, *targets: tuple[str, str]) -> TimeSeries:
    """A third of a row, a line for each variant."""
    legend = VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    panel = TimeSeries().title(title).description(description).unit(unit).datasource(SOURCE)
    return queries(panel.span(8).height(8).min(0).fill_opacity(8).legend(legend.show_legend(True)), *targets)


def number(title: str, unit: str, description: str, *targets: tuple[str, str]) -> Stat:
    """A sixth of a row, the latest value for each variant."""
    panel = Stat().title(title).description(description).unit(unit).datasource(SOURCE)
    return queries(panel.span(4).height(5), *targets)


def quantiles(metric: str) -> tuple[tuple[str, str], ...]:
    """Median and 95th percentile of a histogram, by variant."""
    buckets = f"sum by (variant, le) ({rate(metric + '_bucket')})"
    return tuple(
        (f"histogram_quantile({q}, {buckets})", f"{{{{variant}}}} p{round(100 * q)}") for q in (0.5, 0.95)
    )


def mean(metric: str, more: str = "") -> str:
    """Mean of a histogram's observations."""
    by = "sum by (variant, baseline, source)" if more else "sum by (variant)"
    window = "[$__rate_interval]"
    return (
        f"{by} (rate({metric}_sum{chosen(more)}{window})) / {by} (rate({metric}_count{chosen(more)}{window}))"
    )


def build() -> Dashboard:
    """The whole dashboard."""
    by_variant = "{{variant}}"
    compared = "{{variant}} against {{baseline}}, {{source}}"
    board = (
        Dashboard("Lowkey: dense and reduced")
        .uid("lowkey")
        .tags(["lowkey"])
        .refresh("10s")
        .time("now-30m", "now")
        .with_variable(DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(
            QueryVariable("job")
            .label("Job")
            .query("label_values(lowkey_variant_info, job)")
            .datasource(SOURCE)
            .refresh(VariableRefresh.ON_DASHBOARD_LOAD)
            .include_all(True)
            .multi(True)
        )
        .with_variable(
            QueryVariable("variant")
            .label("Variant")
            .query('label_values(lowkey_variant_info{job=~"$job"}, variant)')
            .datasource(SOURCE)
            .refresh(VariableRefresh.ON_DASHBOARD_LOAD)
            .include_all(True)
            .multi(True)
        )
    )
    panels: dict[str, list[TimeSeries | Stat]] = {
        "Variants": [
            number(
                "State per request",
                "bytes",
                "What every request holds, whatever its length; keys and values of softmax attention come on top.",
                (f"max by (variant) (lowkey_state_bytes_per_request{CHOSEN})", by_variant),
            ),
            number("Engines up", "short", "", (f"sum by (variant) (lowkey_engine_up{CHOSEN})", by_variant)),
            number(
                "Requests running",
                "short",
                "",
                (f"sum by (variant) (lowkey_requests_running{CHOSEN})", by_variant),
            ),
            number(
                "Tokens per second",
                "short",
                "Over all requests.",
                (f"sum by (variant) ({rate('lowkey_generation_tokens_total')})", by_variant),
            ),
            number(
                "Mean KL to the baseline",
                "none",
                "Nats per token, from comparisons and shadow traffic.",
                (mean("lowkey_compare_kl", 'source=~".+"'), compared),
            ),
            number(
                "Restarts",
                "short",
                "In the time shown.",
                (
                    f"sum by (variant) (increase(lowkey_engine_restarts_total{CHOSEN}[$__range]))",
                    by_variant,
                ),
            ),
        ],
        "Speed": [
            graph(
                "Time to first token",
                "s",
                "From the HTTP request.",
                *quantiles("lowkey_time_to_first_token_seconds"),
            ),
            graph(
                "Inter-token latency",
                "s",
                "Within a request.",
                *quantiles("lowkey_inter_token_latency_seconds"),
            ),
            graph(
                "Decode speed of a request",
                "short",
                "Tokens per second that one user sees, mean.",
                (mean("lowkey_request_tokens_per_second"), by_variant),
            ),
            graph(
                "Tokens per second",
                "short",
                "Over all requests.",
                (f"sum by (variant) ({rate('lowkey_generation_tokens_total')})", "{{variant}} generated"),
                (f"sum by (variant) ({rate('lowkey_prompt_tokens_total')})", "{{variant}} prompt"),
            ),
            graph(
                "Batch size", "short", "Requests in one step, mean.", (mean("lowkey_batch_size"), by_variant)
            ),
            graph(
                "Engine step",
                "s",
                "By phase, mean.",
                (
                    share(
                        "lowkey_engine_step_seconds_sum", "lowkey_engine_step_seconds_count", "variant, phase"
                    ),
                    "{{variant}} {{phase}}",
                ),
            ),
        ],
        "State": [
            graph(
                "State slots",
                "short",
                "Cached ones hold prefixes and are taken when a request needs one.",
                (f"sum by (variant, state) (lowkey_state_slots{CHOSEN})", "{{variant}} {{state}}"),
            ),
            graph(
                "State memory in use",
                "bytes",
                "",
                (
                    f"sum by (variant, state) (lowkey_state_pool_bytes{chosen(IN_USE)})",
                    "{{variant}} {{state}}",
                ),
            ),
            graph(
                "Prefix cache hit rate",
                "percentunit",
                "Share of prompt tokens whose state was found.",
                (
                    share("lowkey_prefix_cache_hits_total", "lowkey_prefix_cache_queries_total"),
                    by_variant,
                ),
            ),
        ],
        "Keys and values": [
            graph(
                "Pages",
                "short",
                "Of 64 tokens each, which only models with softmax attention have. Cached ones hold prefixes and are "
                "taken when a request needs one.",
                (f"sum by (variant, state) (lowkey_kv_pages{CHOSEN})", "{{variant}} {{state}}"),
            ),
            graph(
                "Page memory in use",
                "bytes",
                "",
                (
                    f"sum by (variant, state) (lowkey_kv_pool_bytes{chosen(IN_USE)})",
                    "{{variant}} {{state}}",
                ),
            ),
            graph(
                "Preemptions",
                "short",
                "Per second: requests that gave their slot and pages away for others; and how many such requests "
                "wait now.",
                (f"sum by (variant) ({rate('lowkey_preemptions_total')})", "{{variant}} a second"),
                (f"sum by (variant) (lowkey_requests_preempted{CHOSEN})", "{{variant}} waiting"),
            ),
        ],
        "Requests": [
            graph(
                "Waiting",
                "short",
                "Requests without a slot or pages.",
                (f"sum by (variant) (lowkey_requests_waiting{CHOSEN})", by_variant),
            ),
            graph(
                "Ended",
                "reqps",
                "By reason.",
                (
                    f"sum by (variant, finish_reason) ({rate('lowkey_requests_total')})",
                    "{{variant}} {{finish_reason}}",
                ),
            ),
            graph(
                "Refused",
                "reqps",
                "Before they ran.",
                (
                    # Rate limits are of keys and have no variant, which "All" leaves out unless it is asked for.
                    f"sum by (variant, reason) ({rate('lowkey_requests_rejected_total')})".replace(
                        '"$variant"', '"$variant|"'
                    ),
                    "{{variant}} {{reason}}",
                ),
            ),
        ],
        "What the reduction costs": [
            graph(
                "KL to the baseline",
                "none",
                "Nats per token, mean.",
                (mean("lowkey_compare_kl", 'source=~".+"'), compared),
            ),
            graph(
                "Top-1 agreement",
                "percentunit",
                "Share of tokens whose most likely successor is the baseline's.",
                (mean("lowkey_compare_top1_agreement", 'source=~".+"'), compared),
            ),
            graph(
                "Restarts",
                "short",
                "Engine processes started again, so far.",
                (f"sum by (variant) (lowkey_engine_restarts_total{CHOSEN})", by_variant),
            ),
        ],
    }
    for title, row in panels.items():
        board.with_row(Row(title))
        for panel in row:
            board.with_panel(panel)
    return board


if __name__ == "__main__":
    text = JSONEncoder(sort_keys=True, indent=2).encode(build().build())
    Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")
