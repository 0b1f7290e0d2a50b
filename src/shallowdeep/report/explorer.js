"use strict";
/* The gallery and the single sample. Thumbnails are drawn as they are scrolled to. */
(() => {
  const place = document.getElementById("explorer");
  if (!place) return;
  const data = report.read("explorer-data"), trace = report.traces[0];
  const rows = data.rows, top = report.sixteen(data.top), share = report.sixteen(data.share);
  const by = (id) => document.getElementById(id);
  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const className = (label) => label < data.classes.length ? data.classes[label] : "no finite answer";
  const exitName = (e) => trace.labels[e] === "full" ? "full network" : /^\d+$/.test(trace.labels[e]) ? `exit ${trace.labels[e]}` : trace.labels[e];

  /* ---- sheets of thumbnails */
  const sheets = data.sheets.map((text) => URL.createObjectURL(new Blob([report.bytes(text)], { type: "image/webp" })));
  const images = sheets.map((url) => { const image = new Image(); image.src = url; return image; });
  const cell = () => parseFloat(getComputedStyle(by("gallery")).getPropertyValue("--cell"));
  const spot = (g) => { const inside = g % data.perSheet; return { sheet: Math.floor(g / data.perSheet), x: inside % data.columns, y: Math.floor(inside / data.columns) }; };

  /* ---- what is shown */
  const options = (id, pairs) => { for (const [value, text] of pairs) { const option = make("option", "", text); option.value = value; by(id).append(option); } };
  const kinds = [["all", "all samples"], ["wasteful", "wasteful: right before the end"], ["destructive", "destructive: right earlier, wrong at the end"],
    ["first", "only the first exit right"], ["confused", "most confused twentieth"]];
  if (Object.keys(data.heat).length) kinds.push(["heat", "with maps of where exits looked"]);
  options("by-kind", kinds);
  options("by-exit", [["all", "any exit"], ...trace.labels.map((_, e) => [String(e), exitName(e)])]);
  options("by-class", [["all", "any class"], ...[...new Set(rows.map((n) => trace.truth[n]))].sort((a, b) => a - b).map((label) => [String(label), className(label)])]);
  options("by-answer", [["all", "right or wrong"], ["right", "right"], ["wrong", "wrong"]]);
  options("by-order", [["given", "as in the data"], ["confused", "most confused first"], ["unsure", "least sure first"]]);
  const rightAt = (e, n) => trace.said[e * trace.rows + n] === trace.truth[n];
  const facts = rows.map((n) => {
    let early = false, later = false;
    for (let e = 0; e < trace.full; e++) { early ||= rightAt(e, n); later ||= e > 0 && rightAt(e, n); }
    const end = rightAt(trace.full, n);
    return { wasteful: early, destructive: early && !end, first: trace.full > 0 && rightAt(0, n) && !later && !end };
  });
  const sorted = [...trace.confusion].sort((a, b) => b - a); // of all rows, not of those shown
  const odd = sorted[Math.max(0, Math.ceil(sorted.length / 20) - 1)];
  let outcome = report.now(), shown = [], buttons = [], opened = -1, sample = -1;
  const passes = (g) => {
    const n = rows[g], kind = by("by-kind").value, exit = by("by-exit").value, label = by("by-class").value, answer = by("by-answer").value;
    if (exit !== "all" && outcome.exit[n] !== Number(exit)) return false;
    if (label !== "all" && trace.truth[n] !== Number(label)) return false;
    if (answer !== "all" && Boolean(outcome.right[n]) !== (answer === "right")) return false;
    if (kind === "confused") return trace.confusion[n] >= odd;
    if (kind === "heat") return g in data.heat;
    return kind === "all" || facts[g][kind];
  };

  /* ---- the gallery */
  const gallery = by("gallery"), PART = 120;
  const tagged = (button, g) => {
    const n = rows[g], right = outcome.right[n] === 1, exit = trace.labels[outcome.exit[n]];
    const wanted = `${right ? "✓" : "✗"} ${exit}`;
    if (button.dataset.tag === wanted) return;
    button.dataset.tag = wanted;
    button.className = right ? "thumb" : "thumb wrong";
    button.lastChild.textContent = wanted;
    button.setAttribute("aria-label", `Row ${data.numbers[g]}: ${className(trace.truth[n])}, answered ${className(outcome.answer[n])} at ${exitName(outcome.exit[n])}`);
  };
  const thumb = (g) => {
    const button = make("button"), picture = make("span", "pic"), { sheet, x, y } = spot(g), width = cell(), height = width * data.height / data.width;
    button.type = "button";
    button.tabIndex = -1;
    picture.style.height = `${height}px`;
    picture.style.backgroundImage = `url(${sheets[sheet]})`;
    picture.style.backgroundSize = `${data.columns * width}px auto`;
    picture.style.backgroundPosition = `${-x * width}px ${-y * height}px`;
    button.append(picture, make("span", "tag"));
    tagged(button, g);
    button.addEventListener("click", () => open(shown.indexOf(g)));
    return button;
  };
  const more = (until) => {
    const fresh = document.createDocumentFragment();
    while (buttons.length < Math.min(until, shown.length)) { const button = thumb(shown[buttons.length]); buttons.push(button); fresh.append(button); }
    gallery.append(fresh);
  };
  const fill = () => {
    const near = () => gallery.scrollTop + 2 * gallery.clientHeight > gallery.scrollHeight;
    while (buttons.length < shown.length && near()) more(buttons.length + PART);
  };
  const select = () => {
    let found = rows.map((_, g) => g).filter(passes);
    const order = by("by-order").value;
    if (order === "confused") found.sort((a, b) => trace.confusion[rows[b]] - trace.confusion[rows[a]]);
    if (order === "unsure") found.sort((a, b) => outcome.sure[rows[a]] - outcome.sure[rows[b]]);
    by("count").textContent = `${found.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} samples shown here.`;
    if (found.length === shown.length && found.every((g, i) => g === shown[i])) { buttons.forEach((button, i) => tagged(button, shown[i])); return; }
    shown = found;
    buttons = [];
    gallery.replaceChildren();
    gallery.scrollTop = 0;
    more(PART);
    fill();
    if (buttons.length) buttons[0].tabIndex = 0;
  };
  gallery.addEventListener("scroll", fill, { passive: true });
  const focus = (i) => {
    const last = shown.length - 1, to = Math.max(0, Math.min(last, i));
    if (last < 0) return;
    more(to + 1);
    for (const button of buttons) button.tabIndex = -1;
    buttons[to].tabIndex = 0;
    buttons[to].focus();
  };
  gallery.addEventListener("keydown", (event) => {
    const at = buttons.indexOf(document.activeElement);
    if (at < 0) return;
    const across = getComputedStyle(gallery).gridTemplateColumns.split(" ").length;
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across, PageDown: 5 * across, PageUp: -5 * across, Home: -at, End: shown.length };
    if (event.key in steps) { event.preventDefault(); focus(at + steps[event.key]); }
  });
  for (const id of ["by-kind", "by-exit", "by-class", "by-answer", "by-order"]) by(id).addEventListener("change", select);
  by("filters").addEventListener("submit", (event) => event.preventDefault());

  /* ---- one sample */
  const dialog = by("sample");
  const confused = (value) => trace.standardised ? `${Math.abs(value).toFixed(2)} deviations ${value < 0 ? "below" : "above"} the mean` : `${value.toFixed(2)}, a sum of distances`;
  const paint = async (canvas, g, side, heat) => {
    const { sheet, x, y } = spot(g), image = images[sheet];
    await image.decode();
    canvas.width = side;
    canvas.height = Math.round(side * data.height / data.width);
    const pen = canvas.getContext("2d");
    pen.imageSmoothingQuality = "high";
    pen.drawImage(image, x * data.width, y * data.height, data.width, data.height, 0, 0, canvas.width, canvas.height);
    if (!heat) return;
    /* A spotlight, so that greyscale shows it: dark where the exit did not look. */
    const veil = document.createElement("canvas");
    veil.width = veil.height = data.grid;
    const dots = veil.getContext("2d").createImageData(data.grid, data.grid);
    heat.forEach((value, i) => { dots.data[4 * i + 3] = Math.round(170 * (1 - value / 255)); });
    veil.getContext("2d").putImageData(dots, 0, 0);
    pen.drawImage(veil, 0, 0, canvas.width, canvas.height);
  };
  const guess = (label, sure, truth) => {
    const row = make("div", "guess"), bar = make("span", "how-sure"), inside = make("i");
    inside.style.width = `${100 * sure}%`;
    bar.append(inside);
    row.append(make("span", "who", className(label)), bar, make("span", "share", report.percent(sure)));
    if (label === truth) row.classList.add("true");
    return row;
  };
  const guesses = (g, e) => {
    const three = make("div", "three");
    for (let k = 0; k < data.top3; k++) {
      const at = (g * trace.exits + e) * 3 + k;
      three.append(guess(top[at], share[at] / 65535, trace.truth[rows[g]]));
    }
    return three;
  };
  /* What was answered, where it is more than the word of the exit that stopped: of exits together, or of a fallback. */
  const answered = (g) => {
    const n = rows[g], together = outcome.together?.[outcome.exit[n]], item = make("li", "here"), right = outcome.right[n] === 1, sure = report.confidence(outcome.sure[n]);
    const name = make("div", "exit", `${together ? "together" : "answered"} ${right ? "✓" : "✗"}`);
    name.append(make("small", "", "the answer"));
    item.append(name, guess(outcome.answer[n], sure, trace.truth[n]));
    return item;
  };
  const fillSample = () => {
    const g = sample, n = rows[g], stop = outcome.exit[n], right = outcome.right[n] === 1;
    by("sample-title").textContent = `${className(trace.truth[n])}: answered “${className(outcome.answer[n])}” at ${exitName(stop).replace("full", "the full")} ${right ? "✓" : "✗"}`;
    const picture = by("picture");
    picture.setAttribute("aria-label", `Row ${data.numbers[g]}, ${className(trace.truth[n])}`);
    paint(picture, g, 432);
    const fate = facts[g].destructive ? "destructive: right earlier, wrong at the end" : facts[g].wasteful ? "wasteful: right before the end" : rightAt(trace.full, n) ? "only the full network is right" : "no exit is right";
    const about = [["row", String(data.numbers[g])], ["truth", className(trace.truth[n])], ["overthinking", fate], ["confusion", confused(trace.confusion[n])], ["cost", report.percent(outcome.costs[stop], 0)]];
    by("about").replaceChildren(...about.flatMap(([name, value]) => [make("dt", "", name), make("dd", "", value)]));
    const heats = g in data.heat ? report.bytes(data.heat[g]) : null, area = data.grid * data.grid;
    by("depth").replaceChildren(...trace.labels.flatMap((_, e) => {
      const item = make("li", e === stop ? "here" : e > stop ? "past" : ""), name = make("div", "exit", `${exitName(e).replace("full network", "full")} ${rightAt(e, n) ? "✓" : "✗"}`);
      name.append(make("small", "", e === stop ? "stops here" : `cost ${report.percent(trace.costs[e], 0)}`));
      item.append(name, guesses(g, e));
      if (heats && (e + 1) * area <= heats.length) { // a second look has no map of its own
        const canvas = make("canvas");
        canvas.setAttribute("role", "img");
        canvas.setAttribute("aria-label", `Where ${exitName(e)} looked`);
        paint(canvas, g, 168, heats.subarray(e * area, (e + 1) * area));
        item.append(canvas);
      }
      return e === stop && (outcome.together?.[e] || outcome.answer[n] !== trace.said[e * trace.rows + n]) ? [item, answered(g)] : [item];
    }));
    by("before").disabled = opened <= 0;
    by("after").disabled = opened >= shown.length - 1;
  };
  const open = (i) => { if (i < 0 || i >= shown.length) return; opened = i; sample = shown[i]; fillSample(); if (!dialog.open) dialog.showModal(); };
  const step = (by_) => open(opened + by_);
  /* The page's slider once more: behind an open sample nothing can be reached. */
  const slider = by("threshold"), here = by("threshold-here"), back = by("reset-here");
  const follow = () => {
    here.value = slider.value;
    here.setAttribute("aria-valuetext", slider.getAttribute("aria-valuetext"));
    by("level-here").textContent = by("level").textContent;
    back.disabled = by("reset").disabled;
  };
  here.addEventListener("input", () => { slider.value = here.value; slider.dispatchEvent(new Event("input")); });
  back.addEventListener("click", () => { by("reset").click(); here.focus(); });
  follow();
  by("before").addEventListener("click", () => step(-1));
  by("after").addEventListener("click", () => step(1));
  by("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => focus(opened));
  dialog.addEventListener("keydown", (event) => {
    if (event.target === here) return;
    if (event.key === "ArrowRight") step(1);
    if (event.key === "ArrowLeft") step(-1);
  });
  report.follow((now) => {
    outcome = now;
    select();
    follow();
    if (!dialog.open) return;
    /* The sample stays, even where a filter no longer shows it. */
    opened = shown.includes(sample) ? shown.indexOf(sample) : Math.min(opened, shown.length - 1);
    fillSample();
  });
  select();
})();
