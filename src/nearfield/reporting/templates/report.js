"use strict";
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const svgNames = "http://www.w3.org/2000/svg";

  function words(value) {
    if (value === null) return "–";
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-4 || size >= 1e7) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  }

  function addTooltip(figure, svg, chart) {
    const [left, right, top, bottom] = svg.dataset.box.split(" ").map(Number);
    const xs = chart.x;
    const scaled = chart.log ? Math.log : (value) => value;
    const low = scaled(xs.length > 1 ? xs[0] : xs[0] - 0.5);
    const high = scaled(xs.length > 1 ? xs[xs.length - 1] : xs[0] + 0.5);
    const unit = chart.unit ?? "step";
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    tip.setAttribute("role", "status");
    figure.append(tip);
    const cursor = document.createElementNS(svgNames, "line");
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("y1", top);
    cursor.setAttribute("y2", bottom);
    cursor.setAttribute("visibility", "hidden");
    svg.append(cursor);
    let at = -1;

    function show(index) {
      at = Math.max(0, Math.min(xs.length - 1, index));
      const x = left + ((scaled(xs[at]) - low) / (high - low)) * (right - left);
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      cursor.setAttribute("visibility", "visible");
      const lines = chart.series.map((one) => `${one.label}: ${words(one.y[at])}`);
      tip.textContent = [`${unit} ${words(Math.round(xs[at]))}`, ...lines].join("\n");
      tip.hidden = false;
      const box = svg.getBoundingClientRect();
      const home = figure.getBoundingClientRect();
      const place = box.left - home.left + (x / svg.viewBox.baseVal.width) * box.width;
      const room = home.width - tip.offsetWidth;
      tip.style.left = `${Math.max(0, Math.min(room, place + 12 > room ? place - 12 - tip.offsetWidth : place + 12))}px`;
      tip.style.top = `${box.top - home.top + 24}px`;
    }

    function hide() {
      tip.hidden = true;
      cursor.setAttribute("visibility", "hidden");
    }

    function nearest(event) {
      const box = svg.getBoundingClientRect();
      const place = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const wanted = low + ((place - left) / (right - left)) * (high - low);
      let best = 0;
      for (let index = 1; index < xs.length; index += 1) {
        if (Math.abs(scaled(xs[index]) - wanted) < Math.abs(scaled(xs[best]) - wanted)) best = index;
      }
      return best;
    }

    figure.addEventListener("pointermove", (event) => show(nearest(event)));
    figure.addEventListener("pointerleave", hide);
    figure.addEventListener("blur", hide);
    figure.addEventListener("keydown", (event) => {
      const far = Math.max(1, Math.round(xs.length / 10));
      const moves = { ArrowRight: at + 1, ArrowLeft: at - 1, PageDown: at + far, PageUp: at - far, Home: 0, End: xs.length - 1 };
      if (event.key === "Escape") hide();
      if (!(event.key in moves)) return;
      event.preventDefault();
      show(moves[event.key]);
    });
  }

  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const chart = Object.hasOwn(data.charts, svg.dataset.chart) ? data.charts[svg.dataset.chart] : null;
    if (chart && chart.x.length) addTooltip(svg.closest("figure"), svg, chart);
  }

  function addMap(figure, svg, map) {
    const marks = [...svg.querySelectorAll(".mark")].slice(-map.texts.length);
    const order = map.labels.map((_, index) => index).sort((a, b) => map.labels[a].localeCompare(map.labels[b]) || a - b);
    const tip = document.createElement("div");
    tip.className = "tip wide";
    tip.hidden = true;
    tip.setAttribute("role", "status");
    figure.append(tip);
    let at = -1;

    function hide() {
      tip.hidden = true;
      if (at >= 0) marks[at].classList.remove("chosen");
    }

    function show(index) {
      hide();
      at = index;
      marks[at].classList.add("chosen");
      marks[at].parentNode.append(marks[at]);
      tip.textContent = `${map.labels[at]}\n${map.texts[at]}`;
      tip.hidden = false;
      const mark = marks[at].getBoundingClientRect();
      const home = figure.getBoundingClientRect();
      const room = Math.max(0, home.width - tip.offsetWidth);
      tip.style.left = `${Math.max(0, Math.min(room, mark.left - home.left + 12))}px`;
      tip.style.top = `${mark.bottom - home.top + 6}px`;
    }

    figure.addEventListener("pointermove", (event) => {
      let best = -1;
      let least = 24;
      for (const [index, mark] of marks.entries()) {
        const box = mark.getBoundingClientRect();
        const far = Math.hypot(box.left + box.width / 2 - event.clientX, box.top + box.height / 2 - event.clientY);
        if (far < least) [best, least] = [index, far];
      }
      if (best >= 0) show(best);
      else hide();
    });
    figure.addEventListener("pointerleave", hide);
    figure.addEventListener("blur", hide);
    figure.addEventListener("keydown", (event) => {
      const place = at < 0 ? -1 : order.indexOf(at);
      const moves = { ArrowRight: place + 1, ArrowLeft: place - 1, PageDown: place + 20, PageUp: place - 20, Home: 0, End: order.length - 1 };
      if (event.key === "Escape") hide();
      if (!(event.key in moves)) return;
      event.preventDefault();
      show(order[Math.max(0, Math.min(order.length - 1, moves[event.key]))]);
    });
  }

  for (const svg of document.querySelectorAll("svg[data-map]")) {
    const map = data.maps && Object.hasOwn(data.maps, svg.dataset.map) ? data.maps[svg.dataset.map] : null;
    if (map && map.texts.length) addMap(svg.closest("figure"), svg, map);
  }

  const bar = document.querySelector(".filter");
  const queries = [...document.querySelectorAll("[data-query]")];
  if (bar && queries.length) {
    const field = document.getElementById("query-filter");
    const status = document.getElementById("query-count");
    const buttons = [...bar.querySelectorAll("button")];
    let kind = "all";
    const apply = () => {
      const wanted = field.value.trim().toLowerCase();
      for (const query of queries) {
        const right = kind === "all" || query.dataset.query === kind;
        query.hidden = !(right && query.textContent.toLowerCase().includes(wanted));
      }
      for (const heading of document.querySelectorAll("[data-group]")) {
        heading.hidden = !queries.some((query) => !query.hidden && query.dataset.query === heading.dataset.group);
      }
      const shown = queries.filter((query) => !query.hidden).length;
      status.textContent = shown === queries.length ? "" : `${shown} of ${queries.length} shown`;
    };
    for (const button of buttons) {
      button.addEventListener("click", () => {
        kind = button.dataset.show;
        for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
        apply();
      });
    }
    field.addEventListener("input", apply);
    bar.hidden = false;
  }

  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const watch = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        for (const link of links.values()) link.removeAttribute("aria-current");
        links.get(entry.target.id)?.setAttribute("aria-current", "true");
      }
    },
    { rootMargin: "-20% 0px -70% 0px" },
  );
  for (const section of document.querySelectorAll("main > section")) watch.observe(section);

  let closed = [];
  window.addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const one of closed) one.open = true;
  });
  window.addEventListener("afterprint", () => {
    for (const one of closed) one.open = false;
  });
})();
