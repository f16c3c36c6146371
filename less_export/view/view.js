// Shows what a LESS state holds of its text: the tokens that still have a slot, what was absorbed, and the bytes.
// LessView.create(container, wanted) -> {update(view)}; wanted(layer) is called when the reader chooses a layer, whose
// positions the next view should have. The data: less_export/view/occupancy.py. Text enters as text, never as markup.
"use strict";

const LessView = (() => {
  function element(kind, name, text) {
    const made = document.createElement(kind);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function bytes(count) {
    const units = ["B", "kB", "MB", "GB", "TB"];
    let unit = 0;
    while (count >= 1000 && unit < units.length - 1) {
      count /= 1000;
      unit += 1;
    }
    return `${unit && count < 100 ? count.toFixed(1) : Math.round(count)} ${units[unit]}`;
  }

  const number = (count) => count.toLocaleString("en");

  // Tokens that left their slot, by head; absorbed where the layer absorbs, else gone.
  const evicted = (view, head) => view.length - head.held;

  function tile(parent, name) {
    const box = element("div", "tile");
    const value = element("strong");
    const note = element("small");
    box.append(element("span", "", name), value, note);
    parent.append(box);
    return (main, more) => {
      value.textContent = main;
      note.textContent = more;
    };
  }

  function option(select, value, text) {
    const made = element("option", "", text);
    made.value = value;
    select.append(made);
  }

  // For each token of the view: how dark it is (0..1; null without a slot), and what its title says.
  function marks(view, layer, head) {
    if (layer === null) {
      const slots = (n) => `slots in ${n} of ${view.pairs} (layer, head)`;
      return view.tokens.map((_, i) => [view.held[i] ? view.held[i] / view.pairs : null, slots(view.held[i])]);
    }
    const result = view.tokens.map(() => [null, "no slot"]);
    const heads = view.layers[layer].heads.filter((h, i) => h.positions !== null && (head === null || i === head));
    for (const { positions, scores } of heads) {
      const top = Math.max(...scores, 0);
      positions.forEach((position, i) => {
        const place = position - view.first;
        if (place < 0 || place >= result.length) return;
        const shade = top > 0 ? Math.sqrt(scores[i] / top) : 1;
        if (result[place][0] === null) result[place] = [shade, `score ${scores[i]}`];
        else result[place] = [Math.max(result[place][0], shade), `${result[place][1]}, ${scores[i]}`];
      });
    }
    return result;
  }

  function create(container, wanted) {
    const tiles = element("div", "tiles");
    const seen = tile(tiles, "Tokens seen");
    const kept = tile(tiles, "Have a slot somewhere");
    const absorbed = tile(tiles, "Absorbed");
    const state = tile(tiles, "State");
    const full = tile(tiles, "A full cache by now");
    const layers = element("select");
    const heads = element("select");
    layers.setAttribute("aria-label", "layer");
    heads.setAttribute("aria-label", "head");
    const legend = element("p", "legend");
    const choice = element("p", "choice");
    choice.append("Slots of ", layers, " ", heads);
    const text = element("div", "tokens");
    const table = element("table");
    const head = element("tr");
    for (const name of ["layer", "policy", "slots taken", "evicted per head", "mass absorbed (sum of z per head)"])
      head.append(element("th", "", name));
    const body = element("tbody");
    const top = element("thead");
    top.append(head);
    table.append(top, body);
    container.replaceChildren(tiles, choice, legend, text, table);

    let shown = null;
    const selected = (select) => (select.value === "" ? null : Number(select.value));

    layers.addEventListener("change", () => {
      const layer = selected(layers);
      offerHeads();
      if (layer !== null && wanted) wanted(layer);
      draw();
    });
    heads.addEventListener("change", draw);

    function offerHeads() {
      const layer = selected(layers);
      heads.replaceChildren();
      option(heads, "", "all heads");
      if (layer !== null) shown.layers[layer].heads.forEach((_, i) => option(heads, i, `head ${i}`));
      heads.disabled = layer === null;
    }

    function draw() {
      if (shown === null) return;
      const view = shown;
      const layer = selected(layers);
      const all = view.layers.flatMap((l) => l.heads.map((h) => [l, h]));
      const absorbing = all.filter(([l]) => l.absorbs);
      const mean = (pairs) => Math.round(pairs.reduce((sum, [, h]) => sum + evicted(view, h), 0) / pairs.length);
      seen(number(view.length), view.first ? `${number(view.first)} of them before this text` : "");
      kept(number(view.held.filter((n) => n > 0).length), `in ${number(view.pairs)} (layer, head)`);
      if (absorbing.length) absorbed(number(mean(absorbing)), `tokens per head, in ${absorbing.length} heads`);
      else absorbed("none", `${number(mean(all))} tokens per head are gone: no kernels`);
      state(bytes(view.state_bytes), "however long the text");
      full(bytes(view.full_bytes), `${(view.full_bytes / view.state_bytes).toFixed(2)} times the state`);
      legend.textContent =
        layer === null
          ? "The darker a token, the more layers and heads hold a slot for it; pale tokens have none left."
          : "The darker a token, the higher its score in this layer; pale tokens have no slot here.";
      if (view.first) legend.textContent += ` Earlier tokens, which are not shown, have ${number(view.held_before)} slots.`;
      drawTokens(marks(view, layer, selected(heads)));
      drawLayers(view);
    }

    function drawTokens(found) {
      while (text.childElementCount > found.length) text.lastElementChild.remove();
      const fresh = document.createDocumentFragment();
      found.forEach(([shade, title], i) => {
        let span = text.children[i];
        if (!span) {
          span = element("span");
          fresh.append(span);
        }
        const piece = shown.tokens[i] === "" ? "\u2026" : shown.tokens[i];
        if (span.textContent !== piece) span.textContent = piece;
        span.className = shade === null ? "gone" : "kept";
        span.style.setProperty("--shade", shade === null ? "0" : shade.toFixed(3));
        span.title = `position ${shown.first + i}: ${title}`;
      });
      text.append(fresh);
    }

    function drawLayers(view) {
      const masses = view.layers.map((l) => l.heads.reduce((sum, h) => sum + h.mass, 0) / l.heads.length);
      const most = Math.max(...masses, 0);
      body.replaceChildren();
      view.layers.forEach((l, i) => {
        const row = element("tr");
        const slots = l.heads.reduce((sum, h) => sum + h.held, 0) / l.heads.length;
        const gone = l.heads.reduce((sum, h) => sum + evicted(view, h), 0) / l.heads.length;
        const bar = element("meter");
        bar.max = most || 1;
        bar.value = masses[i];
        const mass = element("td");
        if (l.absorbs) mass.append(bar, ` ${masses[i].toPrecision(3)}`);
        else mass.append("absorbs nothing");
        const policy = l.window ? `${l.policy}, window ${number(l.window)}` : l.policy;
        row.append(element("td", "", i), element("td", "", policy));
        row.append(element("td", "", `${number(Math.round(slots))} of ${number(l.slots)}`));
        row.append(element("td", "", number(Math.round(gone))), mass);
        body.append(row);
      });
    }

    function update(view) {
      const first = shown === null || shown.layers.length !== view.layers.length;
      shown = view;
      if (first) {
        layers.replaceChildren();
        option(layers, "", "all layers");
        view.layers.forEach((l, i) => option(layers, i, `layer ${i} (${l.policy})`));
        offerHeads();
      }
      draw();
    }

    return { update };
  }

  return { create };
})();
