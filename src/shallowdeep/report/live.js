"use strict";
/* The page's arithmetic: walks every packed row along the exits and keeps charts and words up to date. All text goes
   through textContent; charts run without eval, by Vega's interpreter. */
const report = (() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const sixteen = (text) => new Uint16Array(bytes(text).buffer);
  const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}\u202f%`;
  const specs = read("charts-data");
  const NEVER = 65536, TOP = 65533, LOW = -10, HIGH = 15, LAST = 400;

  const traces = read("live-data").map((one) => {
    const found = { ...one };
    for (const name of ["said", "step", "truth", "chosenExit", "chosenRight", "chosenSaid", "chosenStep"]) found[name] = sixteen(one[name]);
    return found;
  });

  /* Where the plain rule stops every row: at the first exit as sure as `level`; a row without a finite answer goes on
     to the full exit and ends there. */
  const walk = (trace, level) => {
    const { rows, exits, full, said, step, truth } = trace;
    const exit = new Uint16Array(rows), right = new Uint8Array(rows), answer = new Uint16Array(rows), sure = new Uint16Array(rows);
    for (let n = 0; n < rows; n++) {
      let e = 0;
      for (; e < exits - 1; e++) {
        const s = step[e * rows + n];
        if (e === full ? s === 0 || s >= level : s !== 0 && s >= level) break;
      }
      const at = e * rows + n;
      exit[n] = e;
      answer[n] = said[at];
      sure[n] = step[at];
      right[n] = said[at] === truth[n] ? 1 : 0;
    }
    return { exit, right, answer, sure, costs: trace.costs };
  };
  const chosen = (trace) => ({ exit: trace.chosenExit, right: trace.chosenRight, answer: trace.chosenSaid, sure: trace.chosenStep, costs: trace.chosenCosts, together: trace.together });

  const figures = (trace, outcome) => {
    const left = new Float64Array(trace.exits), good = new Float64Array(trace.exits);
    let cost = 0, right = 0, fullRight = 0, differ = 0;
    for (let n = 0; n < trace.rows; n++) {
      const e = outcome.exit[n], end = trace.said[trace.full * trace.rows + n] === trace.truth[n] ? 1 : 0;
      left[e]++;
      cost += outcome.costs[e];
      if (outcome.right[n]) { good[e]++; right++; }
      fullRight += end;
      if (end !== outcome.right[n]) differ++;
    }
    let before = 0;
    for (let e = 0; e < trace.full; e++) before += left[e];
    const rows = trace.rows, drop = (fullRight - right) / rows;
    const counted = rows + 2, shift = (fullRight - right) / counted;
    const doubt = 1.96 * Math.sqrt(((differ + 2) / counted - shift * shift) / counted);
    return { left, good, cost: cost / rows, accuracy: right / rows, full: fullRight / rows, drop, doubt, early: before / rows };
  };

  const flow = (trace, f) => {
    const parts = [], links = [], table = [];
    let arriving = trace.rows;
    trace.labels.forEach((exit, e) => {
      const on = (arriving - f.left[e]) / trace.rows, right = f.good[e] / trace.rows, wrong = (f.left[e] - f.good[e]) / trace.rows;
      let low = 0;
      for (const [part, share] of [["goes on", on], ["leaves, right", right], ["leaves, wrong", wrong]]) {
        parts.push({ exit, part, low, high: low + share, share });
        low += share;
      }
      if (e + 1 < trace.exits) links.push({ exit, next: trace.labels[e + 1], part: "goes on", low: 0, high: on });
      table.push([trace.costs[e].toFixed(3), percent(arriving / trace.rows), percent(right + wrong), f.left[e] ? percent(f.good[e] / f.left[e]) : "none", percent(on)]);
      arriving -= f.left[e];
    });
    return { parts, links, table };
  };

  /* Errors among the surest answers, by counting rows per step of confidence: [answers kept, errors among them]. */
  const risks = (trace, outcome) => {
    const count = new Uint32Array(NEVER), wrong = new Uint32Array(NEVER);
    for (let n = 0; n < trace.rows; n++) { count[outcome.sure[n]]++; if (!outcome.right[n]) wrong[outcome.sure[n]]++; }
    const found = [];
    let kept = 0, bad = 0;
    for (let s = NEVER - 1; s >= 0; s--) if (count[s]) found.push([kept += count[s], bad += wrong[s]]);
    return found;
  };
  const curve = (trace, outcome) => {
    let next = 0;
    return risks(trace, outcome).flatMap(([kept, bad]) => {
      const coverage = kept / trace.rows;
      if (coverage < next) return [];
      next = coverage + 1 / 120;
      return [{ what: "early exits, by confidence", coverage, risk: bad / kept }];
    });
  };

  /* The last column of the table of risks, and of the table of classes. Of answers equally sure every part is alike. */
  const riskAt = (trace, outcome, shares) => {
    const found = [[0, 0], ...risks(trace, outcome)];
    return shares.map((share) => {
      const wanted = share * trace.rows, i = found.findIndex(([kept]) => kept >= wanted - 1e-6);
      const [low, bad] = found[i - 1], [high, more] = found[i];
      return percent((bad + (more - bad) * (wanted - low) / (high - low)) / wanted, 2);
    });
  };
  const wrongOf = (trace, outcome, labels) => {
    const count = new Map(), wrong = new Map(), more = (counts, label) => counts.set(label, (counts.get(label) ?? 0) + 1);
    for (let n = 0; n < trace.rows; n++) { more(count, trace.truth[n]); if (!outcome.right[n]) more(wrong, trace.truth[n]); }
    return labels.map((label) => count.has(label) ? percent((wrong.get(label) ?? 0) / count.get(label)) : "none");
  };

  const saved = (cost) => { const share = Math.round(100 * (1 - cost)); return share === 0 ? "neither save nor add compute" : share > 0 ? `save ${share}\u202f% of the compute` : `add ${-share}\u202f% to the compute`; };
  const points = (drop, doubt) => {
    const value = Math.round(1000 * drop) / 10, give = `± ${(100 * doubt).toFixed(1)}`;
    if (value === 0) return `at the same accuracy (${give} points)`;
    return `${value > 0 ? "for" : "and gain"} ${Math.abs(value).toFixed(1)} ${give} points of accuracy`;
  };
  const odds = (level) => (level - 1.5) / TOP * (HIGH - LOW) + LOW;
  const confidence = (level) => 1 / (1 + Math.exp(-odds(level)));
  const sureness = (level) => { const c = confidence(level); return percent(c, c > 0.9995 ? 4 : c > 0.99 ? 2 : 1); };
  const lowest = Math.min(...traces.map((trace) => trace.lowest));
  const levelAt = (place) => place >= LAST ? NEVER : Math.round(lowest + (TOP - lowest) * place / LAST * 0.98);

  /* ---- charts */
  const views = [];
  const drawn = [...document.querySelectorAll(".chart")].map(async (place) => {
    const spec = specs[Number(place.dataset.chart)];
    const made = await vegaEmbed(place, spec, { ast: true, mode: "vega", actions: false, renderer: "svg", tooltip: false, defaultStyle: false, logLevel: 1 });
    place.setAttribute("role", "img"); // the charts' own parts have nothing to say without their pictures
    place.removeAttribute("aria-roledescription");
    views.push({ view: made.view, live: place.dataset.live, trace: Number(place.dataset.trace) });
  });
  const fixedRisks = new Map();
  const redraw = (one, f, outcome, moved) => {
    const trace = traces[one.trace];
    if (one.live === "flow") {
      const found = flow(trace, f);
      return one.view.data("flow", found.parts).data("links", found.links).runAsync();
    }
    if (one.live === "now") {
      const inside = (name, value) => { const [low, high] = one.view.scale(name).domain(); return Math.min(high, Math.max(low, value)); };
      return one.view.data("now", moved ? [{ what: "where the slider is", cost: inside("x", f.cost), accuracy: inside("y", f.accuracy) }] : []).runAsync();
    }
    if (one.live === "risk") {
      if (!fixedRisks.has(one)) fixedRisks.set(one, one.view.data("risk").map(({ what, coverage, risk }) => ({ what, coverage, risk })));
      const rest = fixedRisks.get(one);
      const rows = moved ? [...rest.filter((row) => !row.what.startsWith("early exits")), ...curve(trace, outcome)] : rest;
      return one.view.data("risk", rows).runAsync();
    }
    return null;
  };

  /* ---- words */
  const first = new Map();
  const say = (element, text) => {
    if (!first.has(element)) first.set(element, element.textContent);
    element.textContent = text === null ? first.get(element) : text;
  };
  const of = (trace, name, value) => [...document.querySelectorAll(`[data-${name}="${value}"][data-trace="${trace}"], [data-trace="${trace}"] [data-${name}="${value}"]`)];
  const worded = (index, f, outcome, moved, name) => {
    const trace = traces[index], of_all = trace.rows < trace.samples ? `, an even selection of ${trace.samples.toLocaleString("en")}` : "";
    const words = {
      saved: saved(f.cost), points: points(f.drop, f.doubt), time: "",
      rows: `${trace.rows.toLocaleString("en")} rows${of_all}. The threshold was set by hand on these very rows, not chosen on others: its figures flatter it.`,
      tradeoff: `At this threshold (${name}) the exits cost ${percent(f.cost, 0)} of the network and are right about ${percent(f.accuracy)}; the full network about ${percent(f.full)}. One threshold for all exits, chosen by hand: it carries no certificate.`,
      flow: `At this threshold ${percent(f.early, 0)} of the rows never reach the full network.`,
      risk: `At this threshold ${percent(1 - f.accuracy)} of all answers are wrong.`,
    };
    for (const [name, text] of Object.entries(words)) for (const place of of(index, "words", name)) say(place, moved ? text : null);
    const shown = { accuracy: percent(f.accuracy), drop: (100 * f.drop).toFixed(1).replace("-", "−"), cost: percent(f.cost, 0), early: percent(f.early, 0) };
    for (const [name, text] of Object.entries(shown)) for (const place of of(index, "figure", name)) say(place, moved ? text : null);
    for (const table of document.querySelectorAll(`table[data-table][data-trace="${index}"]`)) {
      const rows = [...table.tBodies[0].rows], at = rows.map((row) => Number(row.dataset.at)), kind = table.dataset.table;
      const columns = kind === "flow" ? flow(trace, f).table : (kind === "risk" ? riskAt : wrongOf)(trace, outcome, at).map((text) => [text]);
      rows.forEach((row, e) => columns[e].forEach((text, i) => say(row.cells[row.cells.length - columns[e].length + i], moved ? text : null)));
    }
  };

  /* ---- the slider */
  const slider = document.getElementById("threshold"), reset = document.getElementById("reset");
  const level = document.getElementById("level"), rule = document.getElementById("rule");
  const listeners = [];
  let moved = false, waiting = false, outcomes = traces.map(chosen);
  const update = () => {
    waiting = false;
    const at = levelAt(Number(slider.value));
    outcomes = traces.map((trace) => moved ? walk(trace, at) : chosen(trace));
    const found = traces.map((trace, i) => figures(trace, outcomes[i]));
    const name = at === NEVER ? "nobody leaves early" : `${sureness(at)} confidence`;
    say(level, moved ? name : null);
    slider.setAttribute("aria-valuetext", moved ? name : "the chosen policy");
    say(rule, moved ? "The plain confidence rule: one threshold for all exits, not the chosen policy." : null);
    reset.disabled = !moved;
    document.body.classList.toggle("moved", moved);
    found.forEach((f, i) => worded(i, f, outcomes[i], moved, name));
    for (const one of views) redraw(one, found[one.trace], outcomes[one.trace], moved);
    for (const listener of listeners) listener(outcomes[0]);
  };
  const soon = () => { if (!waiting) { waiting = true; requestAnimationFrame(update); } };
  slider.addEventListener("input", () => { moved = true; soon(); });
  const home = () => {
    /* Where one threshold costs what the chosen policy costs. */
    const wanted = figures(traces[0], chosen(traces[0])).cost;
    let low = 0, high = LAST;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (figures(traces[0], walk(traces[0], levelAt(middle))).cost < wanted) low = middle + 1; else high = middle;
    }
    slider.value = low;
  };
  reset.addEventListener("click", () => { moved = false; home(); soon(); slider.focus(); });
  home();
  slider.setAttribute("aria-valuetext", "the chosen policy");
  /* Anchors stop below the bar, however high it is. */
  new ResizeObserver(() => { document.documentElement.style.scrollPaddingTop = `${document.getElementById("bar").offsetHeight}px`; }).observe(document.getElementById("bar"));
  const ready = Promise.all(drawn);
  /* Paper shows all tables. */
  const folded = () => [...document.querySelectorAll("figure details:not([open]), footer details:not([open])")];
  let unfolded = [];
  addEventListener("beforeprint", () => { unfolded = folded(); for (const details of unfolded) details.open = true; });
  addEventListener("afterprint", () => { for (const details of unfolded) details.open = false; });
  return { read, bytes, sixteen, percent, traces, walk, figures, levelAt, confidence, ready, views, now: () => outcomes[0], follow: (listener) => listeners.push(listener) };
})();
