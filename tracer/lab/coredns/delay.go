// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/miekg/dns"
)

// delay holds every query of its server block back before the next plugin sees it.
type delay struct {
	plugin.Handler
	wait time.Duration
}

func init() { plugin.Register("delay", setup) }

// setup reads `delay DURATION`, e.g. `delay 300ms`.
func setup(c *caddy.Controller) error {
	c.Next() // the directive itself
	args := c.RemainingArgs()
	if len(args) != 1 {
		return plugin.Error("delay", c.ArgErr())
	}
	wait, err := time.ParseDuration(args[0])
	if err != nil {
		return plugin.Error("delay", err)
	}
	dnsserver.GetConfig(c).AddPlugin(func(next plugin.Handler) plugin.Handler {
		return delay{Handler: next, wait: wait}
	})
	return nil
}

// ServeDNS waits, or gives up when the query's context ends first.
func (d delay) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	select {
	case <-time.After(d.wait):
		return plugin.NextOrFailure(d.Name(), d.Handler, ctx, w, r)
	case <-ctx.Done():
		return dns.RcodeServerFailure, ctx.Err()
	}
}

// Name is the directive's name.
func (d delay) Name() string { return "delay" }
